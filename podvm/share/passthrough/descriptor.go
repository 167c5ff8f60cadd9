package passthrough

import (
	"errors"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

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
	d.b.give()
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
