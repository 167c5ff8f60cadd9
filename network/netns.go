package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// createNetNS makes a network namespace with loopback up and what fill makes in it, and keeps it by a
// bind mount at path.
func createNetNS(path string, fill func(*netlink.Handle) error) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	f.Close()
	enter := func() error { return unix.Unshare(unix.CLONE_NEWNET) }
	err = onThread(enter, func() error {
		if err := prepareNetNS(fill); err != nil {
			return err
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind mount: %w", err)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	return nil
}

// prepareNetNS sets up the namespace that the thread is in. The stack in it never speaks for the
// pod, the guest does, so it neither asks for routers nor probes for duplicate addresses; without
// the probe an IPv6 address is valid at once instead of after a second or two.
func prepareNetNS(fill func(*netlink.Handle) error) error {
	for _, s := range []struct{ name, value string }{
		{"accept_ra", "0"}, {"autoconf", "0"}, {"router_solicitations", "0"},
		{"accept_dad", "0"}, {"dad_transmits", "0"},
	} {
		if err := ipv6Sysctl("default", s.name, s.value); err != nil {
			return err
		}
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("loopback up: %w", err)
	}
	return fill(h)
}

// ipv6Sysctl writes a setting of an interface of the thread's namespace; a kernel without IPv6
// has none.
func ipv6Sysctl(iface, name, value string) error {
	path := filepath.Join("/proc/sys/net/ipv6/conf", iface, name)
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("sysctl: %w", err)
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("sysctl: %w", err)
	}
	return nil
}

// deleteNetNS removes the mount at path and the file under it, as far as they exist. The kernel
// frees the namespace, and the taps in it, when nothing holds it any more.
func deleteNetNS(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // not, or no longer, a mount
		}
		if err != nil {
			return fmt.Errorf("unmount network namespace %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network namespace: %w", err)
	}
	return nil
}

// isNetNS tells whether a namespace is mounted at path, and not just a file left by a reboot or a
// crash.
func isNetNS(path string) bool {
	var s unix.Statfs_t
	return unix.Statfs(path, &s) == nil && s.Type == unix.NSFS_MAGIC
}

// inNetNS runs do on a thread that is in the namespace at path. do must not start goroutines that
// count on being there.
func inNetNS(path string, do func() error) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	return onThread(func() error { return netns.Set(ns) }, do)
}

// onThread runs enter and do on a thread of its own and brings the thread back. A thread that
// can't be brought back stays locked to its goroutine, so it ends with it and serves no other.
func onThread(enter, do func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer home.Close()
		if err := enter(); err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		err = do()
		if back := netns.Set(home); back != nil {
			done <- errors.Join(err, fmt.Errorf("leave network namespace: %w", back))
			return
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}
