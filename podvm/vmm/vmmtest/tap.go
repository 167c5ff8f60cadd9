package vmmtest

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// wire is a tap in a network namespace of its own, which goes with the test.
type wire struct {
	tap  *os.File
	work chan func()
}

// The addresses of a wire's ends.
const (
	wireHost   = "10.99.0.1"
	wireGuest  = "10.99.0.2"
	wirePrefix = "/24"
)

func newWire(t *testing.T) *wire {
	t.Helper()
	w := &wire{work: make(chan func())}
	made := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this function, and its namespace with it
		err := w.make()
		made <- err
		for do := range w.work {
			do()
		}
	}()
	t.Cleanup(func() { close(w.work) })
	if err := <-made; err != nil {
		t.Fatalf("make a tap: %v", err)
	}
	t.Cleanup(func() { w.tap.Close() })
	return w
}

// make makes the namespace and the tap, on the thread that is to keep them.
func (w *wire) make() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open /dev/net/tun: %w", err)
	}
	w.tap = os.NewFile(uintptr(fd), "tap")
	request, err := unix.NewIfreq("tap0")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return fmt.Errorf("TUNSETIFF: %w", err)
	}
	link, err := netlink.LinkByName("tap0")
	if err != nil {
		return err
	}
	address, err := netlink.ParseAddr(wireHost + wirePrefix)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(link, address); err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

// dial connects over TCP from the tap's namespace.
func (w *wire) dial(ctx context.Context, address string) (c net.Conn, err error) {
	done := make(chan struct{})
	w.work <- func() {
		defer close(done)
		var d net.Dialer
		c, err = d.DialContext(ctx, "tcp", address)
	}
	<-done
	return c, err
}
