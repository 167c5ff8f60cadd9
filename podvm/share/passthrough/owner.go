package passthrough

import (
	"errors"
	"slices"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// owner has locks of a file by an open file of its own.
type owner struct {
	descriptor
	count *lockCount
	// fh is the handle by which it locked last. owners.mu guards it.
	fh uint64

	// mu has the kernel and ranges see the same order. It holds back nobody but the owner.
	mu     sync.Mutex
	ranges ranges
}

func (o *owner) put() {
	if o.release() {
		o.count.give(len(o.ranges))
	}
}

// set sets or removes a lock without waiting.
func (o *owner) set(lock unix.Flock_t) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	from, to, with := o.ranges.change(&lock)
	more := len(with) - (to - from)
	if !o.count.take(more) {
		return unix.ENOLCK
	}
	if err := unix.FcntlFlock(uintptr(o.fd), unix.F_OFD_SETLK, &lock); err != nil {
		o.count.give(more)
		return err
	}
	o.count.give(-more)
	o.ranges = o.ranges.replace(from, to, with)
	return nil
}

// owners have the POSIX and OFD locks of a file. For the host all of them are one process, so each
// has an open file of its own, whose locks exclude those of other owners, pods and processes.
type owners struct {
	mu  sync.Mutex
	all map[uint64]*owner
}

// get returns the owner, to be put; nil if it has no locks.
func (s *owners) get(id uint64) *owner {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.all[id]
	if o != nil {
		o.hold()
	}
	return o
}

// getBy is get for a lock by the handle.
func (s *owners) getBy(id, fh uint64) *owner {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.all[id]
	if o != nil {
		o.hold()
		o.fh = fh
	}
	return o
}

// add makes o the owner, if there is none yet, and returns the one there is, to be put.
func (s *owners) add(id uint64, o *owner) *owner {
	s.mu.Lock()
	defer s.mu.Unlock()
	if first := s.all[id]; first != nil {
		first.hold()
		first.fh = o.fh
		o.put()
		return first
	}
	if s.all == nil {
		s.all = make(map[uint64]*owner)
	}
	s.all[id] = o
	o.hold()
	return o
}

// remove ends the locks of the owner.
func (s *owners) remove(id uint64) {
	s.mu.Lock()
	o := s.all[id]
	delete(s.all, id)
	s.mu.Unlock()
	if o != nil {
		o.put()
	}
}

// removeBy ends the locks of those who locked by the handle last. Of POSIX owners, who may lock by
// several, none is left when a handle ends, since each close of the file has removed them. An OFD
// owner is an open file and has one handle, but the next open file may have the same id before the
// guest's kernel has released the last one's: then the locks are the next one's.
func (s *owners) removeBy(fh uint64) {
	var gone []*owner
	s.mu.Lock()
	for id, o := range s.all {
		if o.fh == fh {
			gone = append(gone, o)
			delete(s.all, id)
		}
	}
	s.mu.Unlock()
	for _, o := range gone {
		o.put()
	}
}

func (s *owners) closeAll() {
	s.mu.Lock()
	all := s.all
	s.all = nil
	s.mu.Unlock()
	for _, o := range all {
		o.put()
	}
}

// setLock sets or removes a POSIX or OFD lock without waiting. The owner is looked up each time: a
// close in the guest ends it.
func (f *FS) setLock(n *node, in *fuse.LkIn, lock unix.Flock_t) error {
	h, err := f.handles.get(in.Fh, regular)
	if err != nil {
		return err
	}
	defer h.put()
	o := n.locks.getBy(in.Owner, in.Fh)
	if o == nil {
		if lock.Type == unix.F_UNLCK {
			return nil
		}
		if o, err = f.newOwner(n, h, in, lock); err != nil {
			return err
		}
	}
	defer o.put()
	return o.set(lock)
}

// newOwner opens an owner's file once nothing is in the lock's way: those who wait have none.
func (f *FS) newOwner(n *node, h *handle, in *fuse.LkIn, lock unix.Flock_t) (*owner, error) {
	if inTheWay(h.fd, lock) {
		// It may be the owner's own, by a request at the same time.
		if o := n.locks.getBy(in.Owner, in.Fh); o != nil {
			return o, nil
		}
		return nil, unix.EAGAIN
	}
	fd, err := n.openForLocks()
	if err != nil {
		return nil, err
	}
	o := &owner{count: &f.locks, fh: in.Fh}
	if err := o.open(n.b, fd); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return n.locks.add(in.Owner, o), nil
}

// inTheWay says whether there is a lock that excludes this one. fd's own file has none. When the file
// system can't tell, the lock itself will.
func inTheWay(fd int, lock unix.Flock_t) bool {
	err := again(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lock) })
	return err == nil && lock.Type != unix.F_UNLCK
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

// unlockOwner ends all locks that the owner has on the node.
func (f *FS) unlockOwner(id, owner uint64) {
	if n, err := f.nodes.get(id); err == nil {
		n.locks.remove(owner)
		n.put()
	}
}

// unlockHandle ends all locks of the node whose owners locked by the handle.
func (f *FS) unlockHandle(id, fh uint64) {
	if n, err := f.nodes.get(id); err == nil {
		n.locks.removeBy(fh)
		n.put()
	}
}
