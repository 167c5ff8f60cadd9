package passthrough

import (
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// spareFiles are left of RLIMIT_NOFILE for the process itself and for what an operation opens
// until it ends.
const spareFiles = 256

// budget counts how many descriptors the guest may still have open.
type budget struct{ left atomic.Int64 }

func newBudget() (*budget, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, fmt.Errorf("read RLIMIT_NOFILE: %w", err)
	}
	if limit.Cur < 2*spareFiles {
		return nil, fmt.Errorf("RLIMIT_NOFILE is %d; raise it to %d or more", limit.Cur, 2*spareFiles)
	}
	b := &budget{}
	b.left.Store(int64(min(limit.Cur-spareFiles, 1<<31)))
	return b, nil
}

func (b *budget) take() bool {
	if b.left.Add(-1) >= 0 {
		return true
	}
	b.left.Add(1)
	return false
}

// descriptor is a file descriptor that is closed with its last reference: while an operation uses
// it, its number can't become another file's.
type descriptor struct {
	fd   int
	refs atomic.Int64
	b    *budget
}

// open takes fd over with one reference, unless the guest has too many.
func (d *descriptor) open(b *budget, fd int) error {
	if !b.take() {
		return unix.EMFILE
	}
	d.fd, d.b = fd, b
	d.refs.Store(1)
	return nil
}

// hold adds a reference. The caller knows that there is one.
func (d *descriptor) hold() { d.refs.Add(1) }

// release reports whether it closed the descriptor.
func (d *descriptor) release() bool {
	if d.refs.Add(-1) > 0 {
		return false
	}
	unix.Close(d.fd)
	d.b.left.Add(1)
	return true
}

// procPath is a path of what fd is open on, whatever it is: the kernel does not follow a symlink
// that it is.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// reopen opens what fd is open on anew.
func reopen(fd, flags int) (int, error) { return openat(unix.AT_FDCWD, procPath(fd), flags, 0) }

func openat(dir int, name string, flags int, mode uint32) (fd int, err error) {
	err = again(func() (err error) {
		fd, err = unix.Openat(dir, name, flags|unix.O_CLOEXEC|unix.O_NOCTTY, mode)
		return err
	})
	return fd, err
}

// again repeats what a signal interrupted: the runtime sends some, to itself.
func again(do func() error) error {
	for {
		if err := do(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
