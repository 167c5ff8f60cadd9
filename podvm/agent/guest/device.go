package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// findDevice returns the device node of a disk by the address that vmm.VM.AddDisk gave. It waits for
// one that is yet to appear, by the kernel's events, until ctx ends: ErrNotFound.
func findDevice(ctx context.Context, addr string) (string, error) {
	find, err := finder(addr)
	if err != nil {
		return "", err
	}
	if dev := find(); dev != "" {
		return dev, nil
	}
	events, err := uevents()
	if err != nil {
		return "", err
	}
	defer events.Close()
	stop := context.AfterFunc(ctx, func() { events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 16<<10)
	for {
		// Looked up, not taken from the event: events may be lost when there are many.
		if dev := find(); dev != "" {
			return dev, nil
		}
		if _, err := events.Read(buf); ctx.Err() != nil {
			return "", fmt.Errorf("no disk %s appeared in the guest: %w", addr, errdefs.ErrNotFound)
		} else if err != nil && !isOverrun(err) {
			return "", fmt.Errorf("wait for disk %s: %w", addr, err)
		}
	}
}

// finder returns a function that looks for the disk and returns "" while it is not there.
func finder(addr string) (func() string, error) {
	kind, name, _ := strings.Cut(addr, ":")
	if name == "" || strings.ContainsAny(name, "/*?[\\") {
		return nil, fmt.Errorf("disk address %q: want serial:SERIAL or pci:ADDRESS: %w", addr, errdefs.ErrInvalidArgument)
	}
	switch kind {
	case "serial":
		return func() string { return bySerial(name) }, nil
	case "pci":
		return func() string {
			found, err := filepath.Glob("/sys/bus/pci/devices/" + name + "/virtio*/ndbus*/region*/namespace*/block/pmem*")
			if err != nil || len(found) == 0 {
				return ""
			}
			return node(found[0])
		}, nil
	}
	return nil, fmt.Errorf("disk address %q: unknown kind %q: %w", addr, kind, errdefs.ErrInvalidArgument)
}

func bySerial(serial string) string {
	files, err := filepath.Glob("/sys/block/*/serial")
	if err != nil {
		return ""
	}
	for _, file := range files {
		if got, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(got)) == serial {
			return node(filepath.Dir(file))
		}
	}
	return ""
}

// node returns the device node of a folder in /sys, or "" while it can't be opened: the kernel shows a
// disk before it serves it, and sends its event when it does.
func node(sys string) string {
	dev := filepath.Join("/dev", filepath.Base(sys))
	f, err := os.Open(dev)
	if err != nil {
		return ""
	}
	f.Close()
	return dev
}

// uevents opens the kernel's device events.
func uevents() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("watch devices: %w", err)
	}
	const kernelGroup = 1
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("watch devices: %w", err)
	}
	return os.NewFile(uintptr(fd), "uevents"), nil
}
