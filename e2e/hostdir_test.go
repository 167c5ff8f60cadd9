package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// hostDir is a directory of the node as a container's mount.
func hostDir(path string, change ...func(*runtimeapi.Mount)) func(*runtimeapi.ContainerConfig) {
	m := &runtimeapi.Mount{HostPath: path, ContainerPath: "/host"}
	for _, c := range change {
		c(m)
	}
	return func(c *runtimeapi.ContainerConfig) { c.Mounts = append(c.Mounts, m) }
}

// testHostDirectory gives two pods one directory of the node, and looks at it from three sides.
func testHostDirectory(t *testing.T, d *harness.Daemon) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "from-node"), "node\n")
	if err := os.Chmod(dir, os.ModeSetgid|0o775); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, 0, 2000); err != nil {
		t.Fatal(err)
	}
	writer := d.RunPod().Run(images.Busybox, sleeper, hostDir(dir), func(c *runtimeapi.ContainerConfig) {
		c.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			RunAsUser: &runtimeapi.Int64Value{Value: 1000}, RunAsGroup: &runtimeapi.Int64Value{Value: 1000}, SupplementalGroups: []int64{2000},
		}}
	})
	reader := d.RunPod().Run(images.Busybox, sleeper, hostDir(dir, func(m *runtimeapi.Mount) { m.Readonly = true }))

	if out := writer.Exec("sh", "-c", "cat /host/from-node; echo pod > /host/from-pod; mkdir -p /host/a/b; ln -s ../from-pod /host/a/link; cat /host/a/link"); out != "node\npod\n" {
		t.Errorf("the writer reads %q", out)
	}
	harness.Eventually(t, "the other pod sees it", func() error {
		if out := reader.Exec("sh", "-c", "ls /host; cat /host/a/link"); out != "a\nfrom-node\nfrom-pod\npod\n" {
			return fmt.Errorf("it sees %q", out)
		}
		return nil
	})
	if out := reader.Exec("sh", "-c", "{ echo x > /host/new; echo x >> /host/from-pod; rm /host/from-pod; } 2>&1 | grep -c Read-only"); out != "3\n" {
		t.Errorf("writes to a read-only directory: %q of them refused", out)
	}
	info, err := os.Stat(filepath.Join(dir, "from-pod"))
	if err != nil {
		t.Fatal(err)
	}
	if st := info.Sys().(*syscall.Stat_t); st.Uid != 1000 || st.Gid != 2000 {
		t.Errorf("a file that the pod has made in a directory with the group 2000 belongs to %d:%d", st.Uid, st.Gid)
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestHostDirectoryRestart has a container write to a directory of the node while the daemon is killed and
// started again.
func TestHostDirectoryRestart(t *testing.T) {
	d := harness.Start(t)
	dir := t.TempDir()
	pod := d.RunPod()
	writer := pod.Run(images.Busybox, harness.Shell("exec 3>/host/log; i=0; while [ ! -e /host/stop ]; do i=$((i+1)); echo $i >&3 || exit 1; done; exec 3>&-; echo $i"), hostDir(dir))
	log := filepath.Join(dir, "log")
	for range 3 {
		before := len(read(t, log))
		harness.Eventually(t, "the file grows", func() error {
			if now := len(read(t, log)); now < before+500 {
				return fmt.Errorf("%d bytes, were %d", now, before)
			}
			return nil
		})
		d.Kill()
		if err := d.Start(); err != nil {
			t.Fatalf("start again: %v\n%s", err, d.Log())
		}
	}
	write(t, filepath.Join(dir, "stop"), "")
	if s := writer.Wait(); s.ExitCode != 0 {
		t.Errorf("the writer: %d, %q", s.ExitCode, s.Message)
	}
	var last int
	if _, err := fmt.Sscan(writer.Output("stdout"), &last); err != nil {
		t.Fatal(err)
	}
	numbered(t, read(t, log), last)
	pod.Run(images.Busybox, sleeper, hostDir(dir)).Exec("ls", "/host")
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(b)
}

// testHostDirectoryRefused shows what can't be shown to a guest, and what it is told.
func testHostDirectoryRefused(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod()
	_, err := pod.TryCreate(images.Busybox, sleeper, hostDir(t.TempDir(), func(m *runtimeapi.Mount) {
		m.Propagation = runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL
	}))
	if err == nil || !strings.Contains(err.Error(), "HostToContainer") {
		t.Errorf("propagation Bidirectional: %v", err)
	}
	socket := filepath.Join(t.TempDir(), "socket")
	if err := unix.Mkfifo(socket, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := pod.TryCreate(images.Busybox, sleeper, hostDir(socket)); err == nil || !strings.Contains(err.Error(), "named pipe") {
		t.Errorf("a named pipe: %v", err)
	}
}
