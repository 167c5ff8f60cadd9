package passthrough

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// stat reads the attributes of what fd is open on, which may be a symlink.
func stat(fd int, st *unix.Statx_t) error { return statx(fd, unix.STATX_BASIC_STATS, st) }

// statNode is stat that also reads what identify needs, which may cost one more request of NFS or
// FUSE on the host.
func statNode(fd int, st *unix.Statx_t) error {
	return statx(fd, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID|unix.STATX_BTIME, st)
}

func statx(fd, mask int, st *unix.Statx_t) error {
	return again(func() error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, mask, st)
	})
}

func device(st *unix.Statx_t) uint64 { return unix.Mkdev(st.Dev_major, st.Dev_minor) }

// inode is the number that the guest sees. All is one device there, so those of other devices than
// the root's are mixed with their device, and have the highest bit, which no file system uses.
func (f *FS) inode(dev, ino uint64) uint64 {
	if dev == f.dev {
		return ino
	}
	// Source: the finalizer of SplitMix64, so that no two devices differ in few bits.
	x := dev + 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return (ino ^ x ^ x>>31) | 1<<63
}

func (f *FS) attr(st *unix.Statx_t) fuse.Attr {
	return fuse.Attr{
		Ino: f.inode(device(st), st.Ino), Size: st.Size, Blocks: st.Blocks,
		Atime: uint64(st.Atime.Sec), Atimensec: st.Atime.Nsec,
		Mtime: uint64(st.Mtime.Sec), Mtimensec: st.Mtime.Nsec,
		Ctime: uint64(st.Ctime.Sec), Ctimensec: st.Ctime.Nsec,
		Mode: uint32(st.Mode), Nlink: st.Nlink, Owner: fuse.Owner{Uid: st.Uid, Gid: st.Gid},
		Rdev: uint32(unix.Mkdev(st.Rdev_major, st.Rdev_minor)), Blksize: st.Blksize,
	}
}

// GetAttr reads attributes, of the open file if the guest names one.
func (f *FS) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.Flags()&fuse.FUSE_GETATTR_FH != 0 {
		h, err := f.handles.get(in.Fh(), anyKind)
		if err != nil {
			return fuse.ToStatus(err)
		}
		defer h.put()
		return fuse.ToStatus(f.attrOf(h.fd, out))
	}
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer n.put()
	return fuse.ToStatus(f.attrOf(n.fd, out))
}

func (f *FS) attrOf(fd int, out *fuse.AttrOut) error {
	var st unix.Statx_t
	if err := stat(fd, &st); err != nil {
		return err
	}
	*out = fuse.AttrOut{AttrValid: valid, Attr: f.attr(&st)}
	return nil
}

// StatFs describes the file system that the node is in.
func (f *FS) StatFs(_ <-chan struct{}, in *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer n.put()
	var st unix.Statfs_t
	if err := again(func() error { return unix.Fstatfs(n.fd, &st) }); err != nil {
		return fuse.ToStatus(err)
	}
	*out = fuse.StatfsOut{
		Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail, Files: st.Files, Ffree: st.Ffree,
		Bsize: uint32(st.Bsize), Frsize: uint32(st.Frsize), NameLen: uint32(st.Namelen),
	}
	return fuse.OK
}
