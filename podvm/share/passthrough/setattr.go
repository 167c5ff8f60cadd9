package passthrough

import (
	"math"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// SetAttr changes attributes of an inode, and returns all of them.
func (f *FS) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer n.put()
	if err := f.setAttr(n, in); err != nil {
		return fuse.ToStatus(err)
	}
	return fuse.ToStatus(f.attrOf(n.fd, out))
}

func (f *FS) setAttr(n *node, in *fuse.SetAttrIn) error {
	if err := setOwner(n, in); err != nil {
		return err
	}
	// After the owner, whose change removes bits of the mode.
	if mode, ok := in.GetMode(); ok {
		if err := again(func() error { return unix.Chmod(n.path(), mode) }); err != nil {
			return err
		}
	}
	if in.Valid&fuse.FATTR_SIZE != 0 {
		resize := func() error { return f.resize(n, in) }
		do := func(do func() error) error { return do() }
		if in.Valid&fuse.FATTR_KILL_SUIDGID != 0 {
			do = f.creds.withoutFSETID
		}
		if err := do(resize); err != nil {
			return err
		}
	}
	return setTimes(n, in)
}

func setOwner(n *node, in *fuse.SetAttrIn) error {
	uid, setUID := in.GetUID()
	gid, setGID := in.GetGID()
	if !setUID && !setGID {
		return nil
	}
	if setUID && uid == keepID || setGID && gid == keepID {
		return unix.EINVAL
	}
	own := func(id uint32, set bool) int {
		if !set {
			return -1
		}
		return int(id)
	}
	return again(func() error {
		return unix.Fchownat(n.fd, "", own(uid, setUID), own(gid, setGID), unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW)
	})
}

// resize sets a file's size: by the open file if the guest names one that is open for writing, for
// which the file's mode does not count any more.
func (f *FS) resize(n *node, in *fuse.SetAttrIn) error {
	switch {
	case in.Size > math.MaxInt64:
		return unix.EINVAL
	case n.kind == unix.S_IFDIR:
		return unix.EISDIR
	case n.kind != unix.S_IFREG:
		return unix.EINVAL
	}
	if fh, ok := in.GetFh(); ok {
		h, err := f.handles.get(fh, regular)
		if err != nil {
			return err
		}
		defer h.put()
		if h.flags&unix.O_ACCMODE != unix.O_RDONLY {
			return again(func() error { return unix.Ftruncate(h.fd, int64(in.Size)) })
		}
	}
	return again(func() error { return unix.Truncate(n.path(), int64(in.Size)) })
}

func setTimes(n *node, in *fuse.SetAttrIn) error {
	atime := timestamp(in.Valid, fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, in.Atime, in.Atimensec)
	mtime := timestamp(in.Valid, fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, in.Mtime, in.Mtimensec)
	if atime.Nsec == unix.UTIME_OMIT && mtime.Nsec == unix.UTIME_OMIT {
		return nil
	}
	return again(func() error {
		return unix.UtimesNanoAt(unix.AT_FDCWD, n.path(), []unix.Timespec{atime, mtime}, 0)
	})
}

func timestamp(flags, set, now uint32, sec uint64, nsec uint32) unix.Timespec {
	switch {
	case flags&now != 0:
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	case flags&set != 0:
		return unix.Timespec{Sec: int64(sec), Nsec: int64(nsec)}
	}
	return unix.Timespec{Nsec: unix.UTIME_OMIT}
}
