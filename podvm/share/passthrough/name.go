package passthrough

import (
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// checkName refuses all that is not the name of one entry of a directory.
func checkName(name string) error {
	switch {
	case name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00"):
		return unix.EINVAL
	case len(name) > unix.NAME_MAX:
		return unix.ENAMETOOLONG
	}
	return nil
}

// dir returns the directory that has, or is to have, the names.
func (f *FS) dir(id uint64, names ...string) (*node, error) {
	for _, name := range names {
		if err := checkName(name); err != nil {
			return nil, err
		}
	}
	n, err := f.nodes.get(id)
	if err != nil {
		return nil, err
	}
	if n.kind != unix.S_IFDIR {
		n.put()
		return nil, unix.ENOTDIR
	}
	return n, nil
}

// Lookup makes an entry of a directory known to the guest.
func (f *FS) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	dir, err := f.dir(in.NodeId, name)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer dir.put()
	err = f.lookup(dir.place(), name, out)
	if err == nil && out.Mode&unix.S_IFMT == unix.S_IFSOCK {
		f.sockets.looked(name)
	}
	return fuse.ToStatus(err)
}

// lookup makes known what the name is. It is a symlink itself if it is one.
// Precondition: the name is checked.
func (f *FS) lookup(dir place, name string, out *fuse.EntryOut) error {
	fd, err := openat(dir.fd, name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	return f.enter(fd, dir, name, out)
}

// enter makes the inode of fd, an O_PATH descriptor that it takes over, known. The name is empty
// if it may have none.
func (f *FS) enter(fd int, dir place, name string, out *fuse.EntryOut) error {
	var st unix.Statx_t
	if err := statNode(fd, &st); err != nil {
		unix.Close(fd)
		return err
	}
	var by *Crossing
	if name != "" && st.Mnt_id != dir.mount {
		by = &Crossing{dir.node, name}
	}
	id, err := f.nodes.add(fd, &st, by)
	if err != nil {
		return err
	}
	*out = fuse.EntryOut{NodeId: id, EntryValid: valid, AttrValid: valid, Attr: f.attr(&st)}
	return nil
}

// Unlink removes a name that is not a directory's.
func (f *FS) Unlink(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	return f.remove(in.NodeId, name, 0)
}

// Rmdir removes an empty directory.
func (f *FS) Rmdir(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	return f.remove(in.NodeId, name, unix.AT_REMOVEDIR)
}

func (f *FS) remove(id uint64, name string, flags int) fuse.Status {
	dir, err := f.dir(id, name)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer dir.put()
	return fuse.ToStatus(again(func() error { return unix.Unlinkat(dir.fd, name, flags) }))
}

// Rename moves an entry to another name or directory, or exchanges two.
func (f *FS) Rename(_ <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	// RENAME_WHITEOUT would make a device file.
	if in.Flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) != 0 {
		return fuse.EINVAL
	}
	from, err := f.dir(in.NodeId, oldName)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer from.put()
	to, err := f.dir(in.Newdir, newName)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer to.put()
	return fuse.ToStatus(again(func() error {
		return unix.Renameat2(from.fd, oldName, to.fd, newName, uint(in.Flags))
	}))
}

// Link gives an inode one more name.
func (f *FS) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	dir, err := f.dir(in.NodeId, name)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer dir.put()
	n, err := f.nodes.get(in.Oldnodeid)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer n.put()
	// It follows the link in /proc, not the symlink that the inode may be.
	err = again(func() error { return unix.Linkat(unix.AT_FDCWD, n.path(), dir.fd, name, unix.AT_SYMLINK_FOLLOW) })
	if err != nil {
		return fuse.ToStatus(err)
	}
	return fuse.ToStatus(f.lookup(dir.place(), name, out))
}

// Readlink returns what a symlink says. Only the guest follows it.
func (f *FS) Readlink(_ <-chan struct{}, in *fuse.InHeader) ([]byte, fuse.Status) {
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return nil, fuse.ToStatus(err)
	}
	defer n.put()
	if n.kind != unix.S_IFLNK {
		return nil, fuse.EINVAL
	}
	buf := make([]byte, unix.PathMax)
	size := 0
	err = again(func() (err error) { size, err = unix.Readlinkat(n.fd, "", buf); return err })
	if err != nil {
		return nil, fuse.ToStatus(err)
	}
	return buf[:size], fuse.OK
}
