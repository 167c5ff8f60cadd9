package erofs

import (
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	maxName     = 255  // NAME_MAX
	maxPath     = 4096 // PATH_MAX
	maxDepth    = 2048 // of directories, one in another
	maxSteps    = 4096 // directories passed on the way through one path, symlinks included
	maxSymlinks = 40   // followed in one path, as by Linux
)

// inode is a file of any kind.
type inode struct {
	mode      uint32 // type and permissions, as in stat
	uid, gid  uint32
	mtime     int64 // seconds
	mtimeNsec uint32
	nlink     uint32
	rdev      uint32
	size      int64
	xattrs    []byte // as on the disk
	target    string // of a symlink
	dir       *directory

	// Content. A file of zero blocks only, or with holes, has chunks; any other one extent.
	layout    uint16
	block     uint32
	chunkBits uint
	chunks    []uint32

	nid    uint64
	placed bool
}

type directory struct {
	entries map[string]entry
	most    int // entries that there ever were: a map does not shrink
	// stripped is the last layer in which all that older layers put here was removed, so that
	// nothing older can be left.
	stripped int
	names    []string // sorted, with "." and "..", once the tree is complete
}

// entry is a name. Its layer is the one that put the name there or last described the directory.
type entry struct {
	inode *inode
	layer int
}

type extent struct{ block, count uint32 }

// tree is the file system so far. It needs no lock: one goroutine merges.
type tree struct {
	root  *inode
	layer int
	steps int          // through all paths, successful or not
	held  atomic.Int64 // bytes of memory, also by layers that are read meanwhile
	limit Limits
	dead  []extent
}

func newTree(limit Limits) *tree {
	t := &tree{limit: limit}
	t.root = t.implicit()
	t.held.Add(t.root.cost())
	return t
}

// implicit makes a directory that no layer describes.
func (t *tree) implicit() *inode {
	return &inode{mode: unix.S_IFDIR | 0o755, dir: &directory{entries: map[string]entry{}, stripped: t.layer}}
}

func (n *inode) isDir() bool     { return n.mode&unix.S_IFMT == unix.S_IFDIR }
func (n *inode) isRegular() bool { return n.mode&unix.S_IFMT == unix.S_IFREG }
func (n *inode) isSymlink() bool { return n.mode&unix.S_IFMT == unix.S_IFLNK }
func (n *inode) isDevice() bool {
	kind := n.mode & unix.S_IFMT
	return kind == unix.S_IFCHR || kind == unix.S_IFBLK
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

func exhausted(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrResourceExhausted)...)
}

// bounded wants that memory and work are within the limits.
func (t *tree) bounded() error {
	if t.steps > t.limit.Steps {
		return exhausted("paths lead through more than %d directories; build the image with fewer files, or less deeply nested ones", t.limit.Steps)
	}
	return t.fits()
}

// add puts name into dir. The caller has removed what was there.
func (t *tree) add(dir *inode, name string, n *inode) error {
	if len(name) > maxName {
		return invalid("name of %d bytes, at most %d are possible", len(name), maxName)
	}
	if n.nlink == 0 { // of directories it is counted at the end
		t.held.Add(n.cost())
	}
	if !n.isDir() {
		n.nlink++
	}
	dir.dir.entries[name] = entry{n, t.layer}
	t.held.Add(nameCost + int64(len(name)))
	if now := len(dir.dir.entries); now > dir.dir.most {
		t.held.Add(mapCost(now) - mapCost(dir.dir.most))
		dir.dir.most = now
	}
	return nil
}

// remove takes name out of dir, with all that is below it.
func (t *tree) remove(dir *inode, name string) {
	e, ok := dir.dir.entries[name]
	if !ok {
		return
	}
	delete(dir.dir.entries, name)
	t.release(name, e.inode)
}

func (t *tree) release(name string, n *inode) {
	t.held.Add(-nameCost - int64(len(name)))
	if n.isDir() {
		t.held.Add(-n.cost() - mapCost(n.dir.most))
		for child, e := range n.dir.entries {
			t.release(child, e.inode)
		}
		return
	}
	if n.nlink--; n.nlink > 0 {
		return
	}
	t.held.Add(-n.cost())
	if !n.isRegular() {
		return
	}
	if n.layout == layoutPlain {
		t.bury(n.block, blocks(n.size))
		return
	}
	per := uint32(1) << (n.chunkBits - blockBits)
	for i, block := range n.chunks {
		if block != hole {
			t.bury(block, min(per, blocks(n.size)-uint32(i)*per))
		}
	}
}

// bury notes blocks whose content nobody needs any more.
func (t *tree) bury(block, count uint32) {
	if count == 0 {
		return
	}
	if last := len(t.dead) - 1; last >= 0 && t.dead[last].block+t.dead[last].count == block {
		t.dead[last].count += count
		return
	}
	t.dead = append(t.dead, extent{block, count})
	t.held.Add(deadCost)
}

func blocks(size int64) uint32 { return uint32((size + blockSize - 1) / blockSize) }

// strip removes from a directory what older layers put there. What the current layer put there
// stays, whether it came before or after the whiteout.
func (t *tree) strip(dir *inode) {
	if dir.dir.stripped == t.layer {
		return
	}
	dir.dir.stripped = t.layer
	for name := range dir.dir.entries {
		t.whiteout(dir, name)
	}
}

// whiteout removes name as far as it is of older layers.
func (t *tree) whiteout(dir *inode, name string) {
	e, ok := dir.dir.entries[name]
	if !ok {
		return
	}
	if e.inode.isDir() {
		t.strip(e.inode)
	}
	switch {
	case e.layer == t.layer:
	case e.inode.isDir() && len(e.inode.dir.entries) > 0:
		// It lives on for what this layer has put into it, but not with its old attributes.
		fresh := t.implicit()
		fresh.dir = e.inode.dir
		t.held.Add(fresh.cost() - e.inode.cost())
		dir.dir.entries[name] = entry{fresh, t.layer}
	default:
		t.remove(dir, name)
	}
}

// walk resolves the components of a path as a process confined to the tree would: ".." ends at
// the root and symlinks are followed inside. Directories that are missing are made if make is set.
func (t *tree) walk(parts []string, make bool) (*inode, error) {
	path := []*inode{t.root}
	links, steps := 0, len(parts)
	t.steps += steps
	for len(parts) > 0 {
		if steps > maxSteps {
			return nil, invalid("path of more than %d directories", maxSteps)
		}
		part := parts[0]
		parts = parts[1:]
		dir := path[len(path)-1]
		switch part {
		case "", ".":
			continue
		case "..":
			path = path[:max(1, len(path)-1)]
			continue
		}
		next, err := t.step(dir, part, make)
		if err != nil {
			return nil, err
		}
		if next.isSymlink() {
			if links++; links > maxSymlinks {
				return nil, invalid("%q: too many symbolic links", part)
			}
			if strings.HasPrefix(next.target, "/") {
				path = path[:1]
			}
			target := strings.Split(next.target, "/")
			steps, t.steps = steps+len(target), t.steps+len(target)
			parts = append(target, parts...)
			continue
		}
		if path = append(path, next); len(path) > maxDepth {
			return nil, invalid("directories nested deeper than %d", maxDepth)
		}
	}
	return path[len(path)-1], nil
}

// step finds the directory or symlink part in dir.
func (t *tree) step(dir *inode, part string, make bool) (*inode, error) {
	e, ok := dir.dir.entries[part]
	if ok && (e.inode.isDir() || e.inode.isSymlink()) {
		return e.inode, nil
	}
	if !make {
		return nil, invalid("%q is missing or not a directory", part)
	}
	if ok && e.layer == t.layer {
		return nil, invalid("%q is not a directory", part)
	}
	// A file of an older layer that this one uses as a directory without saying so: the overlay
	// that layers are written for shows the directory.
	t.remove(dir, part)
	n := t.implicit()
	return n, t.add(dir, strings.Clone(part), n) // and not all of the path
}
