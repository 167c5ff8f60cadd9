package harness

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { Main(m) }

func TestNamespacesAreOurOwn(t *testing.T) {
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	if len(links) != 1 || links[0].Attrs().Name != "lo" || links[0].Attrs().Flags&net.FlagUp == 0 {
		t.Errorf("links %v, want only a loopback that is up", links)
	}
	if os.Getppid() != 1 {
		t.Errorf("the parent is process %d, want the init of the namespace", os.Getppid())
	}
	if entries, err := os.ReadDir("/run"); err != nil || len(entries) > 0 {
		t.Errorf("/run has %v, %v, want nothing", entries, err)
	}
}

func TestOrphansAreBuried(t *testing.T) {
	before := TakeSnapshot(t)
	if err := exec.Command("sh", "-c", "sleep 0.05 & exit 0").Run(); err != nil {
		t.Fatal(err)
	}
	Eventually(t, "the orphan goes", func() error {
		if leaks := TakeSnapshot(t).Since(before); len(leaks) > 0 {
			return errorf(leaks)
		}
		return nil
	})
}

type errorf []string

func (e errorf) Error() string { return strings.Join(e, "\n") }

func TestLeaksAreSeen(t *testing.T) {
	dir := t.TempDir()
	before := TakeSnapshot(t)
	if leaks := TakeSnapshot(t).Since(before); len(leaks) > 0 {
		t.Fatalf("two snapshots differ: %q", leaks)
	}
	sleep := exec.Command("sleep", "1000")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "leak0"}, Mode: netlink.TUNTAP_MODE_TAP}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(os.TempDir(), "leak"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := exec.Command("iptables", "-t", "nat", "-N", "CNI-DN-0123456789").Run(); err != nil {
		t.Fatal(err)
	}
	if err := exec.Command("ipcmk", "-M", "4096").Run(); err != nil {
		t.Fatal(err)
	}
	leaks := strings.Join(TakeSnapshot(t).Since(before), "\n")
	for _, want := range []string{"sleep 1000", "link leak0 (tuntap)", "mount at " + dir, "tmp/leak", "CNI-DN-0123456789", "shared memory segment"} {
		if !strings.Contains(leaks, want) {
			t.Errorf("%q is missing in\n%s", want, leaks)
		}
	}
	_ = sleep.Process.Kill()
	_ = sleep.Wait()
	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
	if err := os.Remove(filepath.Join(os.TempDir(), "leak")); err != nil {
		t.Error(err)
	}
}

func TestReadLog(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	for text, want := range map[string]int{
		"2026-01-02T03:04:05.000000006Z stdout F hello world\n2026-01-02T03:04:05Z stderr P \n": 2,
		"2026-01-02T03:04:05Z stdout F no newline":                                              -1,
		"yesterday stdout F x\n":            -1,
		"2026-01-02T03:04:05Z stdin F x\n":  -1,
		"2026-01-02T03:04:05Z stdout X x\n": -1,
		"":                                  0,
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		lines, err := ReadLog(file)
		if want < 0 != (err != nil) || want >= 0 && len(lines) != want {
			t.Errorf("%q: got %v, %v", text, lines, err)
		}
	}
}
