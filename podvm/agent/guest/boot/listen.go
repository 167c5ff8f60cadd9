package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/mdlayher/vsock"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/internal/serialmux"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// portName names the virtio-serial port that is the channel where there is no vsock.
const portName = "caisson"

// Serve serves the agent's streams on each channel that the VM has, until the first of them fails:
// vsock, and the virtio-serial port named "caisson", which it waits for if there is no vsock.
func (g *Guest) Serve(ctx context.Context, serve func(context.Context, net.Listener) error) error {
	group, ctx := errgroup.WithContext(ctx)
	vsocks, err := listenVsock()
	if err != nil {
		return err
	}
	if vsocks != nil {
		group.Go(func() error { return serve(ctx, vsocks) })
		go announce()
	}
	group.Go(func() error {
		port, err := g.port(ctx)
		if err != nil {
			return err
		}
		// A write that waits for the host, and Close, need the descriptor in Go's poller.
		open := func() (io.ReadWriteCloser, error) { return os.OpenFile(port, os.O_RDWR|unix.O_NONBLOCK, 0) }
		return serve(ctx, serialmux.Listen(open, vmm.AgentPort))
	})
	return group.Wait()
}

// listenVsock returns nil if the VM has no vsock.
func listenVsock() (net.Listener, error) {
	devices, err := filepath.Glob("/sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio*")
	if err != nil || len(devices) == 0 {
		return nil, err
	}
	l, err := vsock.Listen(vmm.AgentPort, nil)
	if err != nil {
		return nil, fmt.Errorf("listen on vsock port %d: %w", vmm.AgentPort, err)
	}
	return l, nil
}

// port waits for the virtio-serial port and returns the path of its device.
func (g *Guest) port(ctx context.Context) (string, error) {
	for {
		device, err := findPort("/sys/class/virtio-ports")
		if err != nil || device != "" {
			return device, err
		}
		select {
		case <-g.ports:
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// findPort returns "" while there is no such port.
func findPort(class string) (string, error) {
	entries, err := os.ReadDir(class)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	for _, e := range entries {
		name, err := os.ReadFile(filepath.Join(class, e.Name(), "name"))
		if err == nil && strings.TrimSpace(string(name)) == portName {
			return filepath.Join("/dev", e.Name()), nil
		}
	}
	return "", err
}
