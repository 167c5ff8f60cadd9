package erofs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
	aufsPrefix     = ".wh..wh." // what AUFS once kept for itself
)

// Layer is a layer that has been read: the content of its files is in the image, what it does to the tree
// is known.
type Layer struct {
	w    *Writer
	out  *output
	ops  [][]op // in pieces of opPiece, each of which goes when it has been applied
	dir  string // of the last one
	dirs int64  // bytes of names of directories
}

const opPiece = 1024

// op is an entry of a layer. Neighbours share the name of their directory.
type op struct {
	dir, base string
	inode     *inode // nil of a whiteout or a hard link
	target    string // of a hard link
	link      bool
}

// Read reads a layer, an uncompressed tar archive, up to its end marker; what may follow is the caller's
// to read. Several layers may be read at the same time. Apply makes it part of the image.
//
// A layer that can't be right is ErrInvalidArgument, one beyond the limits ErrResourceExhausted; after an
// error the writer is of no use.
//
// Source: OCI image specification, layer.md; GNU and PAX tar formats.
func (w *Writer) Read(ctx context.Context, layer io.Reader) (*Layer, error) {
	l := &Layer{w: w, out: w.output()}
	defer func() {
		w.giveBack(l.out)
		l.out = nil
	}()
	tr := tar.NewReader(layer)
	for {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		hdr, err := tr.Next()
		if err == io.EOF {
			return l, nil
		}
		if err != nil {
			return nil, readError(err)
		}
		if limit := w.tree.limit.Entries; w.entries.Add(1) > int64(limit) {
			return nil, exhausted("layers have more than %d entries together; build the image with fewer files, or in fewer steps", limit)
		}
		if err := l.read(ctx, hdr, tr); err != nil {
			return nil, fmt.Errorf("layer entry %.200q: %w", hdr.Name, err)
		}
	}
}

// Apply puts a layer on top of those before it. Names are resolved inside the image whatever they say:
// absolute ones and those with ".." start at its root, and symlinks are followed within it. Its errors
// are those of Read.
func (w *Writer) Apply(ctx context.Context, l *Layer) error {
	w.tree.layer++
	for i, piece := range l.ops {
		for _, o := range piece {
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			w.tree.held.Add(-o.cost()) // what of it goes into the tree counts there
			if err := w.tree.apply(o); err != nil {
				return fmt.Errorf("layer entry %.200q: %w", o.dir+o.base, err)
			}
			if err := w.tree.bounded(); err != nil {
				return err
			}
		}
		l.ops[i] = nil
	}
	w.tree.held.Add(-l.dirs)
	return nil
}

// readError gives errors of the tar format their kind and leaves those of the stream below alone.
func readError(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("read layer: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("read layer: %w", err)
}

// read notes an entry, and copies its content.
func (l *Layer) read(ctx context.Context, hdr *tar.Header, content io.Reader) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := clean(hdr.Name)
	if err != nil {
		return err
	}
	o := op{}
	o.dir, o.base = path.Split(name)
	aufs := strings.HasPrefix(o.base, aufsPrefix) && o.base != opaqueMarker
	if aufs || strings.Contains(o.dir, "/"+aufsPrefix) {
		return nil
	}
	switch {
	case o.whiteout():
	case hdr.Typeflag == tar.TypeLink:
		o.link, o.target = true, strings.Clone(hdr.Linkname)
	default:
		if o.inode, err = newInode(hdr); err != nil {
			return err
		}
		if o.base == "" && !o.inode.isDir() {
			return invalid("the root must be a directory")
		}
		if o.inode.isRegular() {
			if err := l.content(ctx, o.inode, content); err != nil {
				return err
			}
		}
	}
	return l.note(o)
}

func (o op) whiteout() bool { return strings.HasPrefix(o.base, whiteoutPrefix) }

// note keeps an entry until its turn comes. Its texts must be its own: of a header they are parts of all its records.
func (l *Layer) note(o op) error {
	t := l.w.tree
	if l.dir == o.dir {
		o.dir = l.dir
	} else {
		size := int64(len(o.dir) + len(o.base)) // of the name that it is part of
		l.dir, l.dirs = o.dir, l.dirs+size
		t.held.Add(size)
	}
	o.base = strings.Clone(o.base) // and not all of the name
	t.held.Add(o.cost())
	last := len(l.ops) - 1
	if last < 0 || len(l.ops[last]) == opPiece {
		l.ops, last = append(l.ops, make([]op, 0, opPiece)), last+1
	}
	l.ops[last] = append(l.ops[last], o)
	return t.fits()
}

// apply does to the tree what an entry says.
func (t *tree) apply(o op) error {
	dir, err := t.walk(strings.Split(o.dir, "/"), !o.whiteout())
	switch {
	case o.whiteout() && err != nil:
		return nil // where there is no directory, there is nothing to hide
	case o.whiteout():
		return t.hide(dir, o.base)
	case err != nil:
		return err
	case o.link:
		return t.link(dir, o.base, o.target)
	case o.inode.isDir():
		return t.mkdir(dir, o.base, o.inode)
	}
	t.remove(dir, o.base)
	return t.add(dir, o.base, o.inode)
}

// hide applies the marker base in dir.
func (t *tree) hide(dir *inode, base string) error {
	if base == opaqueMarker {
		t.strip(dir)
		return nil
	}
	hidden := strings.TrimPrefix(base, whiteoutPrefix)
	if hidden == "" || hidden == "." || hidden == ".." {
		return invalid("whiteout of nothing")
	}
	t.whiteout(dir, hidden)
	return nil
}

// clean makes a name absolute, without "." and "..". The root is "/".
func clean(name string) (string, error) {
	if len(name) > maxPath {
		return "", invalid("path of %d bytes, at most %d are possible", len(name), maxPath)
	}
	if strings.IndexByte(name, 0) >= 0 {
		return "", invalid("path with a zero byte")
	}
	return path.Clean("/" + name), nil
}

// mkdir adds a directory, or gives the one that is there the attributes of n.
func (t *tree) mkdir(dir *inode, base string, n *inode) error {
	n.dir = &directory{entries: map[string]entry{}, stripped: t.layer}
	if base == "" {
		n.dir = t.root.dir
		t.held.Add(n.cost() - t.root.cost())
		*t.root = *n
		return nil
	}
	if old, ok := dir.dir.entries[base]; ok && old.inode.isDir() {
		n.dir = old.inode.dir
		t.held.Add(n.cost() - old.inode.cost())
		dir.dir.entries[base] = entry{n, t.layer}
		return nil
	}
	t.remove(dir, base)
	return t.add(dir, base, n)
}

// link makes base in dir another name of target, as link(2): a symlink is linked, not followed.
func (t *tree) link(dir *inode, base, target string) error {
	name, err := clean(target)
	if err != nil {
		return err
	}
	targetDir, targetBase := path.Split(name)
	parent, err := t.walk(strings.Split(targetDir, "/"), false)
	if err != nil {
		return fmt.Errorf("hard link to %.200q: %w", target, err)
	}
	e, ok := parent.dir.entries[targetBase]
	if !ok || e.inode.isDir() || base == "" {
		return invalid("hard link to %.200q, which is not a file of the image", target)
	}
	if old, ok := dir.dir.entries[base]; ok && old.inode == e.inode {
		dir.dir.entries[base] = entry{e.inode, t.layer}
		return nil
	}
	t.remove(dir, base)
	if e.inode.nlink == 0 {
		return invalid("hard link to %.200q, which it takes the place of", target)
	}
	return t.add(dir, base, e.inode)
}

var kinds = map[byte]uint32{
	tar.TypeReg:       unix.S_IFREG,
	'\x00':            unix.S_IFREG, // of old archives
	tar.TypeCont:      unix.S_IFREG,
	tar.TypeGNUSparse: unix.S_IFREG,
	tar.TypeDir:       unix.S_IFDIR,
	tar.TypeSymlink:   unix.S_IFLNK,
	tar.TypeChar:      unix.S_IFCHR,
	tar.TypeBlock:     unix.S_IFBLK,
	tar.TypeFifo:      unix.S_IFIFO,
}

// newInode makes an inode with the attributes of a tar header, still without content.
func newInode(hdr *tar.Header) (*inode, error) {
	kind, ok := kinds[hdr.Typeflag]
	if !ok {
		return nil, invalid("tar entry of unknown type %q", hdr.Typeflag)
	}
	if outside(hdr.Uid, math.MaxUint32-1) || outside(hdr.Gid, math.MaxUint32-1) {
		return nil, invalid("owner %d:%d out of range", hdr.Uid, hdr.Gid)
	}
	xattrs, err := encodeXattrs(hdr.PAXRecords)
	if err != nil {
		return nil, err
	}
	n := &inode{
		mode: kind | uint32(hdr.Mode)&0o7777,
		uid:  uint32(hdr.Uid), gid: uint32(hdr.Gid),
		mtime: hdr.ModTime.Unix(), mtimeNsec: uint32(hdr.ModTime.Nanosecond()),
		xattrs: xattrs,
	}
	switch {
	case n.isSymlink():
		if hdr.Linkname == "" || len(hdr.Linkname) >= maxPath || strings.IndexByte(hdr.Linkname, 0) >= 0 {
			return nil, invalid("symlink with a target of %d bytes, or with a zero byte in it", len(hdr.Linkname))
		}
		n.mode = unix.S_IFLNK | 0o777 // as any symlink on Linux
		n.target, n.size = strings.Clone(hdr.Linkname), int64(len(hdr.Linkname))
	case n.isDevice():
		if outside(int(hdr.Devmajor), 1<<12-1) || outside(int(hdr.Devminor), 1<<20-1) {
			return nil, invalid("device %d:%d out of range", hdr.Devmajor, hdr.Devminor)
		}
		n.rdev = deviceNumber(hdr.Devmajor, hdr.Devminor)
	case n.isRegular():
		n.size = hdr.Size
	}
	return n, nil
}

func outside(n, limit int) bool { return n < 0 || n > limit }
