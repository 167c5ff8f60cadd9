package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/pierrec/lz4/v4"
	"golang.org/x/sys/unix"
)

func TestParseEvent(t *testing.T) {
	e := parseEvent([]byte("add@/devices/system/cpu/cpu1\x00ACTION=add\x00DEVPATH=/devices/system/cpu/cpu1\x00" +
		"SUBSYSTEM=cpu\x00MODALIAS=cpu:type:x86=y\x00SEQNUM=7\x00"))
	want := event{"ACTION": "add", "DEVPATH": "/devices/system/cpu/cpu1", "SUBSYSTEM": "cpu", "MODALIAS": "cpu:type:x86=y", "SEQNUM": "7"}
	for key, value := range want {
		if e[key] != value {
			t.Errorf("%s is %q, want %q", key, e[key], value)
		}
	}
	if len(e) != len(want) {
		t.Errorf("got %q", e)
	}
	if e := parseEvent(nil); len(e) != 0 {
		t.Errorf("nothing became %q", e)
	}
}

func TestReceiveTakesOnlyTheKernelsEvents(t *testing.T) {
	events, err := uevents()
	if err != nil {
		t.Fatal(err)
	}
	defer events.Close()
	raw, err := events.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var own unix.Sockaddr
	var failed error
	if err := errors.Join(raw.Control(func(fd uintptr) { own, failed = unix.Getsockname(int(fd)) }), failed); err != nil {
		t.Fatal(err)
	}
	other, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other)
	forged := []byte("ACTION=add\x00SUBSYSTEM=cpu\x00DEVPATH=/../tmp\x00")
	if err := unix.Sendto(other, forged, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: own.(*unix.SockaddrNetlink).Pid}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16<<10)
	if n, err := receive(events, buf); n != 0 || err != nil {
		t.Errorf("took a forged event: %q, %v", buf[:n], err)
	}
	if err := write("/sys/class/mem/null/uevent", "change"); err != nil {
		t.Fatal(err)
	}
	for { // others' events may come before
		n, err := receive(events, buf)
		if err != nil {
			t.Fatal(err)
		}
		if e := parseEvent(buf[:n]); e["ACTION"] == "change" && e["DEVNAME"] == "null" {
			return
		}
	}
}

func TestFindPort(t *testing.T) {
	class := filepath.Join(t.TempDir(), "virtio-ports")
	if device, err := findPort(class); device != "" || err != nil {
		t.Fatalf("without the class: %q, %v", device, err)
	}
	for port, name := range map[string]string{"vport0p1": "console\n", "vport0p2": "caisson\n", "vport0p3": ""} {
		if err := os.MkdirAll(filepath.Join(class, port), 0o755); err != nil {
			t.Fatal(err)
		}
		if name == "" {
			continue // a port whose name is yet to come
		}
		if err := os.WriteFile(filepath.Join(class, port, "name"), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if device, err := findPort(class); device != "/dev/vport0p2" || err != nil {
		t.Errorf("got %q, %v", device, err)
	}
}

// folder makes a folder of modules that are none.
func folder(t *testing.T) modules {
	t.Helper()
	dir := t.TempDir()
	packed := make([]byte, 4+lz4.CompressBlockBound(100))
	packed[0] = 100
	n, err := lz4.CompressBlockHC([]byte(strings.Repeat("x", 100)), packed[4:], lz4.Level9, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"modules.boot":        "erofs\nvirtio_blk\n",
		"modules.dep":         "erofs: libcrc32c\nlibcrc32c:\nxt_conntrack: nf_conntrack\n",
		"modules.alias":       "alias fs-erofs erofs\nalias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci\nalias ipt_conntrack xt_conntrack\n",
		"erofs.ko":            "no module",
		"xt_conntrack.ko.lz4": string(packed[:4+n]),
		"short.ko.lz4":        "x",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return modules{dir}
}

func TestResolve(t *testing.T) {
	m := folder(t)
	for name, want := range map[string][]string{
		"erofs": {"erofs"}, "fs-erofs": {"erofs"}, "xt-conntrack": {"xt_conntrack"}, "ipt_conntrack": {"xt_conntrack"},
		"pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc00i00": {"virtio_pci"}, "fs-btrfs": nil, "": nil,
	} {
		got, err := m.resolve(name)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q stands for %q, %v; want %q", name, got, err, want)
		}
	}
	hardware, err := m.aliases(hardware...)
	if err != nil || len(hardware) != 1 {
		t.Errorf("aliases of hardware: %v, %v", hardware, err)
	}
}

func TestLoadLeavesOutUnknownModules(t *testing.T) {
	m := folder(t)
	if err := m.load("virtio_blk"); err != nil {
		t.Errorf("a module the kernel has built in: %v", err)
	}
	if err := (modules{t.TempDir()}).load("erofs"); err != nil {
		t.Errorf("a kernel without modules: %v", err)
	}
	if names, err := m.boot(); err != nil || len(names) != 2 {
		t.Errorf("boot lists %q, %v", names, err)
	}
	if names, err := (modules{t.TempDir()}).boot(); err != nil || names != nil {
		t.Errorf("boot of a kernel without modules lists %q, %v", names, err)
	}
}

func TestInsertPackedRefuses(t *testing.T) {
	m := folder(t)
	if err := insertPacked(filepath.Join(m.dir, "short.ko.lz4")); err == nil {
		t.Error("took a module of one byte")
	}
	// Unpacked right, but no module: the kernel says so.
	err := insertPacked(filepath.Join(m.dir, "xt_conntrack.ko.lz4"))
	if errno := unix.Errno(0); !errors.As(err, &errno) {
		t.Errorf("got %v, want the kernel's refusal", err)
	}
}

func TestModprobeFails(t *testing.T) {
	if Modprobe(nil) == 0 || Modprobe([]string{"-q", "--", "no-such-module"}) == 0 {
		t.Error("modprobe succeeded at nothing")
	}
}

// The monitor's slack is its own: a thread that starts programs keeps the one it had.
func TestCalm(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	slack := func(tid int) string {
		t.Helper()
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/timerslack_ns", tid))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(text))
	}
	before := slack(unix.Gettid())
	if err := calm(); err != nil {
		t.Fatal(err)
	}
	monitor, err := monitorThread("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	if got := slack(monitor); got != "2000000" {
		t.Errorf("the monitor's slack is %s", got)
	}
	if got := slack(unix.Gettid()); got != before {
		t.Errorf("the slack of another thread became %s", got)
	}
}
