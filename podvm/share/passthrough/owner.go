package passthrough

import (
	"errors"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// owners have the POSIX locks of a file. For the host all of them are one process, so each has an
// open file of its own, whose locks exclude those of other owners, pods and processes.
type owners struct {
	mu  sync.Mutex
	all map[uint64]*descriptor
}

// get returns the owner's open file, to be released; nil if it has none.
func (o *owners) get(owner uint64) *descriptor {
	o.mu.Lock()
	defer o.mu.Unlock()
	d := o.all[owner]
	if d != nil {
		d.hold()
	}
	return d
}

// add makes d the owner's, if it has none yet, and returns the owner's, to be released.
func (o *owners) add(owner uint64, d *descriptor) *descriptor {
	o.mu.Lock()
	defer o.mu.Unlock()
	if first := o.all[owner]; first != nil {
		first.hold()
		d.release()
		return first
	}
	if o.all == nil {
		o.all = make(map[uint64]*descriptor)
	}
	o.all[owner] = d
	d.hold()
	return d
}

func (o *owners) remove(owner uint64) {
	o.mu.Lock()
	d := o.all[owner]
	delete(o.all, owner)
	o.mu.Unlock()
	if d != nil {
		d.release()
	}
}

func (o *owners) closeAll() {
	o.mu.Lock()
	all := o.all
	o.all = nil
	o.mu.Unlock()
	for _, d := range all {
		d.release()
	}
}

// setLock sets or removes a POSIX lock without waiting. The owner's open file is looked up each
// time: a close in the guest ends it.
func (n *node) setLock(owner uint64, lock unix.Flock_t) error {
	d := n.locks.get(owner)
	if d == nil {
		if lock.Type == unix.F_UNLCK {
			return nil
		}
		d = &descriptor{}
		fd, err := n.openForLocks()
		if err != nil {
			return err
		}
		if err := d.open(n.b, fd); err != nil {
			unix.Close(fd)
			return err
		}
		d = n.locks.add(owner, d)
	}
	defer d.release()
	return unix.FcntlFlock(uintptr(d.fd), unix.F_OFD_SETLK, &lock)
}

// openForLocks opens a file for both kinds of locks, or only to read when it can't be written:
// then the guest has no way to want the other kind.
func (n *node) openForLocks() (int, error) {
	fd, err := openNow(n, unix.O_RDWR)
	readOnly := []error{unix.EROFS, unix.EACCES, unix.EPERM, unix.ETXTBSY}
	if slices.ContainsFunc(readOnly, func(e error) bool { return errors.Is(err, e) }) {
		return openNow(n, unix.O_RDONLY)
	}
	return fd, err
}

// unlockOwner ends all POSIX locks that the owner has on the node.
func (f *FS) unlockOwner(id, owner uint64) {
	if n, err := f.nodes.get(id); err == nil {
		n.locks.remove(owner)
		n.put()
	}
}
