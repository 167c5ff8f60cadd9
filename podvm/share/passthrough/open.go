package passthrough

import (
	"errors"
	"slices"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// openFlags are those of the guest's that count on the host. O_DIRECT is not: the guest's cache is
// what it is about, and its buffers are not aligned as the host's devices want.
func openFlags(guest uint32) (int, error) {
	flags := int(guest) & (unix.O_ACCMODE | unix.O_APPEND | unix.O_SYNC | unix.O_DSYNC | unix.O_TRUNC)
	if flags&unix.O_ACCMODE == unix.O_ACCMODE {
		return 0, unix.EINVAL
	}
	return flags, nil
}

// Open opens a file, and nothing but files: the rest has its life in the guest's kernel.
func (f *FS) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	return f.open(in, regular, in.Flags, out)
}

// OpenDir opens a directory.
func (f *FS) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	return f.open(in, directory, unix.O_RDONLY, out)
}

func (f *FS) open(in *fuse.OpenIn, kind, flags uint32, out *fuse.OpenOut) fuse.Status {
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer n.put()
	h, fd, err := f.openNode(n, kind, flags, in.Mode)
	if err != nil {
		return fuse.ToStatus(err)
	}
	id, err := f.handles.add(h, fd)
	if err != nil {
		return fuse.ToStatus(err)
	}
	*out = fuse.OpenOut{Fh: id, OpenFlags: h.openFlags()}
	return fuse.OK
}

// openNode opens a node that has to be of the kind. how are the protocol's flags beside O_*.
func (f *FS) openNode(n *node, kind, guest, how uint32) (*handle, int, error) {
	switch {
	case n.kind == kind:
	case kind == directory:
		return nil, 0, unix.ENOTDIR
	case n.kind == unix.S_IFDIR:
		return nil, 0, unix.EISDIR
	default:
		return nil, 0, unix.EACCES
	}
	flags, err := openFlags(guest)
	if err != nil {
		return nil, 0, err
	}
	fd := -1
	open := func() (err error) { fd, err = openNow(n, flags); return err }
	if how&fuse.OPEN_KILL_SUIDGID != 0 && flags&unix.O_TRUNC != 0 {
		err = f.creds.withoutFSETID(open)
	} else {
		err = open()
	}
	if err != nil {
		return nil, 0, err
	}
	var st unix.Statx_t
	if err := stat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, 0, err
	}
	if uint32(st.Mode)&unix.S_IFMT != kind {
		unix.Close(fd)
		return nil, 0, unix.EACCES
	}
	h := &handle{kind: kind, flags: flags}
	if kind == directory {
		h.dir = f.newDirStream(n, device(&st))
	} else if st.Size == 0 && flags&unix.O_ACCMODE != unix.O_WRONLY { // for NFS it may be one more request
		h.unsized = unsized(fd)
	}
	return h, fd, nil
}

// kernelFiles are the file systems whose files the kernel writes as they are read, and has no sizes of.
var kernelFiles = []int64{
	unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC,
	unix.TRACEFS_MAGIC, unix.DEBUGFS_MAGIC, unix.SECURITYFS_MAGIC, unix.SELINUX_MAGIC,
}

// unsized tells whether an empty file may have content all the same.
func unsized(fd int) bool {
	var st unix.Statfs_t
	err := again(func() error { return unix.Fstatfs(fd, &st) })
	return err == nil && slices.Contains(kernelFiles, int64(st.Type))
}

// openNow does not wait for the other end of what should not be here, but for who has a lease.
func openNow(n *node, flags int) (int, error) {
	fd, err := reopen(n.fd, flags|unix.O_NONBLOCK)
	if errors.Is(err, unix.EAGAIN) && (n.kind == unix.S_IFREG || n.kind == unix.S_IFDIR) {
		return reopen(n.fd, flags)
	}
	return fd, err
}

// Release closes a file. Its flock and its OFD locks, which no flush ends, go with it.
func (f *FS) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	if in.ReleaseFlags&fuse.RELEASE_FLUSH != 0 {
		f.unlockOwner(in.NodeId, in.LockOwner)
	}
	f.handles.remove(in.Fh)
	f.unlockHandle(in.NodeId, in.Fh)
}

// ReleaseDir closes a directory.
func (f *FS) ReleaseDir(in *fuse.ReleaseIn) { f.handles.remove(in.Fh) }

// Flush is one close of several: it returns errors of writes before, which NFS reports at a close,
// and ends the POSIX locks of whom it was.
func (f *FS) Flush(_ <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	h, err := f.handles.get(in.Fh, anyKind)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer h.put()
	f.unlockOwner(in.NodeId, in.LockOwner)
	fd, err := unix.FcntlInt(uintptr(h.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fuse.ToStatus(err)
	}
	return fuse.ToStatus(unix.Close(fd))
}

// Fsync has a file's content on the disk.
func (f *FS) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status { return f.sync(in, regular) }

// FsyncDir has a directory's entries on the disk.
func (f *FS) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status { return f.sync(in, directory) }

func (f *FS) sync(in *fuse.FsyncIn, kind uint32) fuse.Status {
	h, err := f.handles.get(in.Fh, kind)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer h.put()
	const dataOnly = 1 // FUSE_FSYNC_FDATASYNC
	if in.FsyncFlags&dataOnly != 0 {
		return fuse.ToStatus(again(func() error { return unix.Fdatasync(h.fd) }))
	}
	return fuse.ToStatus(again(func() error { return unix.Fsync(h.fd) }))
}
