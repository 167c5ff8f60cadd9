package podvm

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/internal/hungfs"
)

// TestMountsRefused: what can't reach a VM is refused, with what to do instead.
func TestMountsRefused(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	dir := t.TempDir()
	pages := filepath.Join(dir, "pods", "uid", "volumes", "kubernetes.io~empty-dir", "pages")
	if err := os.MkdirAll(pages, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("hugetlbfs", pages, "hugetlbfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(pages, unix.MNT_DETACH) })
	socket, pipe := filepath.Join(dir, "socket"), filepath.Join(dir, "pipe")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	at := func(path string) ContainerConfig {
		return ContainerConfig{Mounts: []Mount{{HostPath: path, ContainerPath: "/m"}}}
	}
	shared := at(dir)
	shared.Mounts[0].Propagation = "rshared"
	for name, c := range map[string]struct {
		config ContainerConfig
		says   string
	}{
		"propagation":      {shared, "use None or HostToContainer"},
		"socket":           {at(socket), "over the network"},
		"named pipe":       {at(pipe), "named pipe"},
		"character device": {at("/dev/null"), "character device"},
		"huge pages":       {at(pages), "use medium Memory"},
		"device":           {ContainerConfig{Devices: []Device{{HostPath: "/dev/ptmx", ContainerPath: "/dev/x"}}}, "privileged"},
	} {
		config := containerConfig("main")
		config.Mounts, config.Devices = c.config.Mounts, c.config.Devices
		if _, err := p.Create(soon(t), config); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), elsewhere) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// TestHostPathHangs: a path whose file system does not answer is given up, and asking again does not begin
// anew. Other paths are found meanwhile.
func TestHostPathHangs(t *testing.T) {
	dir, end := hungfs.Mount(t)
	n := newNode(t)
	path := filepath.Join(dir, "x")
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	before := runtime.NumGoroutine()
	for range 5 {
		if _, _, err := n.hostPath(short, path); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), path) {
			t.Errorf("got %v", err)
		}
	}
	if more := runtime.NumGoroutine() - before; more > 1 {
		t.Errorf("%d goroutines hang", more)
	}
	other := resolved(t)
	if found, _, err := n.hostPath(soon(t), other); err != nil || found != other {
		t.Errorf("another path: %q, %v", found, err)
	}
	end()
	if _, _, err := n.hostPath(soon(t), path); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after its end: %v", err)
	}
}
