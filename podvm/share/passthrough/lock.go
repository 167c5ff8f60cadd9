package passthrough

import (
	"errors"
	"math"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	lockPause    = time.Millisecond
	lockMaxPause = 100 * time.Millisecond
)

// GetLk says which lock is in the way of one.
func (f *FS) GetLk(_ <-chan struct{}, in *fuse.LkIn, out *fuse.LkOut) fuse.Status {
	lock, err := fileLock(&in.Lk)
	if err != nil {
		return fuse.ToStatus(err)
	}
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer n.put()
	h, err := f.handles.get(in.Fh, regular)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer h.put()
	// The owner's own locks are not in its way. A handle has no locks of this kind.
	d := &h.descriptor
	if own := n.locks.get(in.Owner); own != nil {
		defer own.put()
		d = &own.descriptor
	}
	if err := again(func() error { return unix.FcntlFlock(uintptr(d.fd), unix.F_OFD_GETLK, lock) }); err != nil {
		return fuse.ToStatus(err)
	}
	*out = fuse.LkOut{Lk: fuse.FileLock{Typ: uint32(lock.Type)}}
	if lock.Type != unix.F_UNLCK {
		out.Lk.Start, out.Lk.End = uint64(lock.Start), math.MaxInt64
		if lock.Len > 0 {
			out.Lk.End = uint64(lock.Start + lock.Len - 1)
		}
	}
	return fuse.OK // without a process: those of the host are not the guest's
}

// SetLk sets or removes a lock, or fails with EAGAIN.
func (f *FS) SetLk(_ <-chan struct{}, in *fuse.LkIn) fuse.Status {
	return fuse.ToStatus(f.lock(in, func(try func() error) error { return again(try) }))
}

// SetLkw is SetLk that waits, until cancel or Close.
func (f *FS) SetLkw(cancel <-chan struct{}, in *fuse.LkIn) fuse.Status {
	return fuse.ToStatus(f.lock(in, func(try func() error) error { return f.wait(cancel, try) }))
}

// wait tries again and again. A wait in the kernel could only be ended by a signal to its thread.
func (f *FS) wait(cancel <-chan struct{}, try func() error) error {
	for pause := lockPause; ; pause = min(2*pause, lockMaxPause) {
		if err := again(try); !errors.Is(err, unix.EAGAIN) {
			return err
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
			continue
		case <-cancel:
		case <-f.done:
		}
		timer.Stop()
		return unix.EINTR
	}
}

func (f *FS) lock(in *fuse.LkIn, until func(try func() error) error) error {
	if in.LkFlags&fuse.LK_FLOCK != 0 {
		return f.flock(in, until)
	}
	lock, err := fileLock(&in.Lk)
	if err != nil {
		return err
	}
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return err
	}
	defer n.put()
	if n.kind != unix.S_IFREG {
		return unix.EINVAL
	}
	return until(func() error { return f.setLock(n, in, *lock) })
}

// flock locks the handle's own open file, as in the guest.
func (f *FS) flock(in *fuse.LkIn, until func(try func() error) error) error {
	how := map[uint32]int{unix.F_RDLCK: unix.LOCK_SH, unix.F_WRLCK: unix.LOCK_EX, unix.F_UNLCK: unix.LOCK_UN}[in.Lk.Typ]
	if how == 0 {
		return unix.EINVAL
	}
	h, err := f.handles.get(in.Fh, anyKind)
	if err != nil {
		return err
	}
	defer h.put()
	return until(func() error { return unix.Flock(h.fd, how|unix.LOCK_NB) })
}

// fileLock checks a lock of the guest's.
func fileLock(lk *fuse.FileLock) (*unix.Flock_t, error) {
	switch {
	case lk.Typ != unix.F_RDLCK && lk.Typ != unix.F_WRLCK && lk.Typ != unix.F_UNLCK,
		lk.Start > lk.End, lk.End > math.MaxInt64:
		return nil, unix.EINVAL
	}
	l := &unix.Flock_t{Type: int16(lk.Typ), Whence: unix.SEEK_SET, Start: int64(lk.Start)}
	if lk.End < math.MaxInt64 { // 0 is to the end, whatever that becomes
		l.Len = int64(lk.End - lk.Start + 1)
	}
	return l, nil
}
