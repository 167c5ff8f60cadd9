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

// AddLayer puts one layer, an uncompressed tar archive, on top of those before it. It reads up to
// the archive's end marker; what may follow is the caller's to read.
//
// A layer that can't be applied is ErrInvalidArgument, one beyond the limits ErrResourceExhausted;
// after an error the writer is of no use. Names are resolved inside the image whatever they say:
// absolute ones and those with ".." start at its root, and symlinks are followed within it.
//
// Source: OCI image specification, layer.md; GNU and PAX tar formats.
func (w *Writer) AddLayer(ctx context.Context, layer io.Reader) error {
	w.tree.layer++
	tr := tar.NewReader(layer)
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		hdr, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return readError(err)
		}
		if err := w.entry(ctx, hdr, tr); err != nil {
			return fmt.Errorf("layer entry %.200q: %w", hdr.Name, err)
		}
	}
}

// readError gives errors of the tar format their kind and leaves those of the stream below alone.
func readError(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("read layer: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("read layer: %w", err)
}

func (w *Writer) entry(ctx context.Context, hdr *tar.Header, content io.Reader) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := clean(hdr.Name)
	if err != nil {
		return err
	}
	dirname, base := path.Split(name)
	aufs := strings.HasPrefix(base, aufsPrefix) && base != opaqueMarker
	if aufs || strings.Contains(dirname, "/"+aufsPrefix) {
		return nil
	}
	whiteout := strings.HasPrefix(base, whiteoutPrefix)
	dir, err := w.tree.walk(strings.Split(dirname, "/"), !whiteout)
	switch {
	case whiteout && err != nil:
		return nil // where there is no directory, there is nothing to hide
	case whiteout:
		return w.tree.hide(dir, base)
	case err != nil:
		return err
	}
	return w.apply(ctx, dir, base, hdr, content)
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

func (w *Writer) apply(ctx context.Context, dir *inode, base string, hdr *tar.Header, content io.Reader) error {
	t := w.tree
	if hdr.Typeflag == tar.TypeLink {
		return t.link(dir, base, hdr.Linkname)
	}
	n, err := newInode(hdr)
	if err != nil {
		return err
	}
	if n.isDir() {
		return t.mkdir(dir, base, n)
	}
	if base == "" {
		return invalid("the root must be a directory")
	}
	t.remove(dir, base)
	if n.isRegular() {
		if err := w.content(ctx, n, content); err != nil {
			return err
		}
	}
	return t.add(dir, base, n)
}

// mkdir adds a directory, or gives the one that is there the attributes of n.
func (t *tree) mkdir(dir *inode, base string, n *inode) error {
	n.dir = &directory{entries: map[string]entry{}, stripped: t.layer}
	if base == "" {
		n.dir = t.root.dir
		*t.root = *n
		return nil
	}
	if old, ok := dir.dir.entries[base]; ok && old.inode.isDir() {
		n.dir = old.inode.dir
		t.meta += len(n.xattrs) - len(old.inode.xattrs)
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
		n.target, n.size = hdr.Linkname, int64(len(hdr.Linkname))
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
