package passthrough

import (
	"errors"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// createTries bounds how often a name may come and go while it is opened.
const createTries = 16

// made is a new entry with the caller's user and group. make gets the directory and the mode.
func (f *FS) made(in *fuse.InHeader, name string, mode, umask uint32, out *fuse.EntryOut, make func(dir int, mode uint32) error) fuse.Status {
	dir, err := f.dir(in.NodeId, name)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer dir.put()
	mode = masked(dir, mode, umask)
	err = f.creds.as(in.Uid, in.Gid, func() error { return again(func() error { return make(dir.fd, mode) }) })
	if err != nil {
		return fuse.ToStatus(err)
	}
	return fuse.ToStatus(f.lookup(dir.place(), name, out))
}

// masked applies the caller's umask, unless the directory has a default ACL, which takes its place.
func masked(dir *node, mode, umask uint32) uint32 {
	umask &= 0o777
	if mode&umask == 0 {
		return mode
	}
	if n, err := unix.Getxattr(dir.path(), "system.posix_acl_default", nil); err == nil && n > 0 {
		return mode
	}
	return mode &^ umask
}

// Mkdir makes a directory.
func (f *FS) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return f.made(&in.InHeader, name, in.Mode&0o7777, in.Umask, out, func(dir int, mode uint32) error {
		return unix.Mkdirat(dir, name, mode)
	})
}

// Symlink makes a symlink. What it says is the guest's matter.
func (f *FS) Symlink(_ <-chan struct{}, in *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	return f.made(in, name, 0, 0, out, func(dir int, _ uint32) error {
		return unix.Symlinkat(target, dir, name)
	})
}

// Mknod makes a file, a FIFO or a socket. Of devices there is only overlay's whiteout, which is
// none.
func (f *FS) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	kind := in.Mode & unix.S_IFMT
	switch kind {
	case 0, unix.S_IFREG, unix.S_IFIFO:
	case unix.S_IFSOCK:
		f.sockets.made.Store(true)
	case unix.S_IFCHR:
		if in.Rdev != 0 {
			return fuse.EPERM
		}
	default:
		return fuse.EPERM
	}
	return f.made(&in.InHeader, name, in.Mode&0o7777, in.Umask, out, func(dir int, mode uint32) error {
		return unix.Mknodat(dir, name, kind|mode, 0)
	})
}

// Create makes a file and opens it, or opens what is there.
func (f *FS) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	dir, err := f.dir(in.NodeId, name)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer dir.put()
	// By name only what is new is opened: what is there may be anything.
	err = unix.ENOENT
	for range createTries {
		err = f.createFile(dir, in, name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, out)
		if !errors.Is(err, unix.EEXIST) || in.Flags&unix.O_EXCL != 0 {
			break
		}
		err = f.openEntry(dir, in, name, out)
		if !errors.Is(err, unix.ENOENT) {
			break
		}
	}
	return fuse.ToStatus(err)
}

// Tmpfile makes a file without a name.
func (f *FS) Tmpfile(_ <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	dir, err := f.dir(in.NodeId)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer dir.put()
	return fuse.ToStatus(f.createFile(dir, in, ".", unix.O_TMPFILE|int(in.Flags&unix.O_EXCL), out))
}

// createFile makes a new file as the caller and opens it.
func (f *FS) createFile(dir *node, in *fuse.CreateIn, name string, how int, out *fuse.CreateOut) error {
	flags, err := openFlags(in.Flags)
	if err != nil {
		return err
	}
	mode := masked(dir, in.Mode&0o7777, in.Umask)
	fd := -1
	err = f.creds.as(in.Uid, in.Gid, func() (err error) {
		fd, err = openat(dir.fd, name, flags&^unix.O_TRUNC|how, mode)
		return err
	})
	if err != nil {
		return err
	}
	// The node is of what is open, whatever the name has become.
	path, err := reopen(fd, unix.O_PATH)
	if err != nil {
		unix.Close(fd)
		return err
	}
	if err := f.enter(path, place{}, "", &out.EntryOut); err != nil {
		unix.Close(fd)
		return err
	}
	return f.opened(&out.EntryOut, &handle{kind: regular, flags: flags}, fd, &out.OpenOut)
}

// openEntry opens what the name is, if it is a file.
func (f *FS) openEntry(dir *node, in *fuse.CreateIn, name string, out *fuse.CreateOut) error {
	if err := f.lookup(dir.place(), name, &out.EntryOut); err != nil {
		return err
	}
	n, err := f.nodes.get(out.NodeId)
	if err != nil {
		return err
	}
	defer n.put()
	h, fd, err := f.openNode(n, regular, in.Flags, in.OpenFlags)
	if err != nil {
		f.Forget(n.id, 1)
		return err
	}
	return f.opened(&out.EntryOut, h, fd, &out.OpenOut)
}

// opened gives the guest a handle of fd, which is of the entry. Without one the entry is not
// known either.
func (f *FS) opened(entry *fuse.EntryOut, h *handle, fd int, out *fuse.OpenOut) error {
	id, err := f.handles.add(h, fd)
	if err != nil {
		f.Forget(entry.NodeId, 1)
		return err
	}
	*out = fuse.OpenOut{Fh: id, OpenFlags: h.openFlags()}
	return nil
}
