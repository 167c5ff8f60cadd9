package share

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/internal/rights"
)

// kept are the capabilities that serving takes: to be any owner, and to read and write for all of them.
const kept = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID |
	1<<unix.CAP_SETUID | 1<<unix.CAP_SETGID | 1<<unix.CAP_SETFCAP

// confine leaves the process nothing but its descriptors and, as its root, an empty directory: what is
// served is mounted there. Its namespaces are its own already.
func confine() error {
	if err := raiseFiles(); err != nil {
		return err
	}
	if err := ownRoot(); err != nil {
		return err
	}
	return rights.Keep(kept) // those of other pods have the same, and may be shown the node's /proc
}

// ownRoot makes a file system with only a proc, by which descriptors are opened anew, the root.
func ownRoot() error {
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"make its mounts private", func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") }},
		{"mount a tmpfs", func() error { return unix.Mount("tmpfs", dir, "tmpfs", safe, "mode=0700,size=4M") }},
		{"enter it", func() error { return os.Chdir(dir) }},
		{"mount proc", func() error {
			if err := os.Mkdir("proc", 0o500); err != nil {
				return err
			}
			return unix.Mount("proc", "proc", "proc", safe, "subset=pid")
		}},
		{"make it the root", func() error { return unix.PivotRoot(".", ".") }},
		{"leave the former root", func() error { return unix.Unmount(".", unix.MNT_DETACH) }},
		{"enter the root", func() error { return os.Chdir("/") }},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return nil
}

// raiseFiles lets it have as many descriptors as there may be: every file that a guest knows is one.
func raiseFiles() error {
	data, err := os.ReadFile("/proc/sys/fs/nr_open")
	if err != nil {
		return err
	}
	var most, limit unix.Rlimit
	if _, err := fmt.Sscan(string(data), &most.Max); err != nil {
		return fmt.Errorf("/proc/sys/fs/nr_open: %w", err)
	}
	most.Cur = most.Max
	err = unix.Setrlimit(unix.RLIMIT_NOFILE, &most)
	if errors.Is(err, unix.EPERM) { // the daemon itself may have no more than this
		if err = unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil {
			limit.Cur = limit.Max
			err = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
		}
	}
	if err != nil {
		return fmt.Errorf("raise the limit of open files: %w", err)
	}
	return nil
}
