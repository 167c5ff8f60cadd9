package boot

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ownRoot replaces the initramfs as root by a bind mount of it. The kernel's own root mount can
// neither be moved nor be left by pivot_root, which container runtimes need; this one can, and
// costs no copy.
func ownRoot() error {
	if err := unix.Mount("/", "/mnt", "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind root: %w", err)
	}
	if err := unix.Chdir("/mnt"); err != nil {
		return fmt.Errorf("enter root: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("enter root: %w", err)
	}
	return unix.Chdir("/")
}

const (
	noDev  = unix.MS_NOSUID | unix.MS_NODEV
	noExec = noDev | unix.MS_NOEXEC
)

type mount struct {
	kind, target string
	flags        uintptr
	data         string
}

var (
	// early mounts are seen too by what the kernel runs, whose root is the initramfs.
	early = []mount{
		{"devtmpfs", "/dev", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755"},
		{"proc", "/proc", noExec, ""},
		{"sysfs", "/sys", noExec, ""},
	}
	late = []mount{
		{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666"},
		{"tmpfs", "/dev/shm", noDev, "mode=1777,size=0,nr_inodes=0"},
		{"mqueue", "/dev/mqueue", noExec, ""},
		// Not the half of a memory that is still to grow: the pod's memory is the limit.
		{"tmpfs", "/run", noDev, "mode=0755,size=0,nr_inodes=0"},
		{"tmpfs", "/tmp", noDev, "mode=1777,size=0,nr_inodes=0"},
		{"cgroup2", "/sys/fs/cgroup", noExec, "nsdelegate,memory_recursiveprot"},
		{"securityfs", "/sys/kernel/security", noExec, ""},
		{"bpf", "/sys/fs/bpf", noExec, "mode=0700"},
	}
)

func mountEarly() error { return mountAll(early) }

func mountLate() error { return mountAll(late) }

func mountAll(mounts []mount) error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.target, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// links makes the names in /dev that programs expect.
func links() error {
	for name, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, name); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// delegate gives all cgroup controllers to the containers' cgroups.
func delegate() error {
	const root = "/sys/fs/cgroup"
	names, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("list cgroup controllers: %w", err)
	}
	var all []string
	for _, name := range strings.Fields(string(names)) {
		all = append(all, "+"+name)
	}
	return write(filepath.Join(root, "cgroup.subtree_control"), strings.Join(all, " "))
}

// loopback brings up lo.
func loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(uint16(net.FlagUp))
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

// write writes a kernel's setting.
func write(file, value string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("set %s to %q: %w", file, value, err)
	}
	return nil
}
