package passthrough

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// All by path in /proc, since an O_PATH descriptor has no extended attributes: it leads to the inode
// itself, also when that is a symlink, for which the l*xattr calls would take the link in /proc.

// GetXAttr reads an attribute. Without dest it says how long that is.
func (f *FS) GetXAttr(_ <-chan struct{}, in *fuse.InHeader, attr string, dest []byte) (uint32, fuse.Status) {
	return f.readXAttr(in.NodeId, func(path string) (int, error) { return unix.Getxattr(path, attr, dest) })
}

// ListXAttr reads the names of attributes. Without dest it says how long they are.
func (f *FS) ListXAttr(_ <-chan struct{}, in *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	return f.readXAttr(in.NodeId, func(path string) (int, error) { return unix.Listxattr(path, dest) })
}

func (f *FS) readXAttr(id uint64, read func(path string) (int, error)) (uint32, fuse.Status) {
	n, err := f.nodes.get(id)
	if err != nil {
		return 0, fuse.ToStatus(err)
	}
	defer n.put()
	size := 0
	err = again(func() (err error) { size, err = read(n.path()); return err })
	if err != nil {
		return 0, fuse.ToStatus(err)
	}
	return uint32(size), fuse.OK
}

// SetXAttr sets an attribute.
func (f *FS) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, attr string, data []byte) fuse.Status {
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer n.put()
	// The guest may hand over more than it says.
	data = data[:min(len(data), int(in.Size))]
	set := func() error {
		return again(func() error { return unix.Setxattr(n.path(), attr, data, int(in.Flags)) })
	}
	if in.SetXAttrFlags&fuse.SETXATTR_ACL_KILL_SGID != 0 && attr == "system.posix_acl_access" {
		return fuse.ToStatus(f.creds.withoutFSETID(set))
	}
	return fuse.ToStatus(set())
}

// RemoveXAttr removes an attribute.
func (f *FS) RemoveXAttr(_ <-chan struct{}, in *fuse.InHeader, attr string) fuse.Status {
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer n.put()
	return fuse.ToStatus(again(func() error { return unix.Removexattr(n.path(), attr) }))
}
