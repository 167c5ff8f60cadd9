package erofs

import (
	"fmt"
	"iter"
	"slices"

	"golang.org/x/sys/unix"
)

// metaPad keeps the root from being inode number 0, which readers of directories take for a
// deleted entry.
const metaPad = inodeSize

// Finish writes directories, inodes and superblock and returns the size of the image in bytes, a
// multiple of Align. The file is complete then but not yet synced.
func (w *Writer) Finish() (int64, error) {
	out, err := w.last()
	if err != nil {
		return 0, err
	}
	p := &placer{end: metaPad, block: out.block()}
	if err := p.place(w.tree.root); err != nil {
		return 0, err
	}
	if err := writeBlocks(out, p.order); err != nil {
		return 0, err
	}
	meta := out.pos()
	if err := writeInodes(out, p.order, meta); err != nil {
		return 0, err
	}
	if err := out.padTo(roundUp(out.pos(), blockSize)); err != nil {
		return 0, err
	}
	end := out.pos()
	if err := out.flush(); err != nil {
		return 0, err
	}
	if err := out.punch(w.tree.dead); err != nil {
		return 0, err
	}
	first := make([]byte, blockSize)
	superblock(first, &super{
		rootNid: uint16(w.tree.root.nid), inodes: uint64(len(p.order)),
		blocks: uint32(end / blockSize), metaBlock: uint32(meta / blockSize), uuid: w.uuid,
	})
	if _, err := w.f.WriteAt(first, 0); err != nil {
		return 0, fmt.Errorf("write image: %w", err)
	}
	size := roundUp(end, Align)
	if err := w.f.Truncate(size); err != nil {
		return 0, fmt.Errorf("write image: %w", err)
	}
	return size, nil
}

// placed is an inode with its place in the image.
type placed struct {
	*inode
	parent *inode
	at     int64 // offset from the start of the inodes
}

// placer gives each inode its number and each directory and long symlink its blocks.
type placer struct {
	order []placed
	end   int64 // of the inodes so far
	block int64 // the next free one
}

// place places the tree below root: the inodes of a directory's files side by side, sorted.
func (p *placer) place(root *inode) error {
	p.add(root, root)
	return p.children(root)
}

func (p *placer) children(dir *inode) error {
	for _, name := range dir.dir.names {
		if e, ok := dir.dir.entries[name]; ok && !e.inode.placed {
			p.add(e.inode, dir)
		}
	}
	for _, name := range dir.dir.names {
		if e, ok := dir.dir.entries[name]; ok && e.inode.isDir() {
			if err := p.children(e.inode); err != nil {
				return err
			}
		}
	}
	if p.block > hole-1 {
		return invalid("image of more than %d blocks", uint32(hole))
	}
	return nil
}

func (p *placer) add(n, parent *inode) {
	if n.isDir() {
		n.sortNames()
	}
	inline := int64(0)
	switch {
	case n.isDir() || n.isSymlink():
		n.layout, inline = n.tail()
		n.block = uint32(p.block)
		p.block += (n.size - inline + blockSize - 1) / blockSize
	case n.layout == layoutChunks:
		inline = 4 * int64(len(n.chunks))
	}
	fixed := inodeSize + int64(len(n.xattrs))
	at := roundUp(p.end, inodeSize)
	if n.layout == layoutInline && at%blockSize+fixed+inline > blockSize {
		at = roundUp(at, blockSize)
	}
	n.nid, n.placed = uint64(at/inodeSlot), true
	p.order = append(p.order, placed{n, parent, at})
	p.end = at + fixed + inline
}

// tail decides whether the last, partial block of a directory or symlink lies behind its inode,
// and how many bytes that are. It does if all of it fits into one block with the inode.
func (n *inode) tail() (layout uint16, inline int64) {
	tail := n.size % blockSize
	if n.isSymlink() {
		tail = n.size
	}
	if tail == 0 || inodeSize+int64(len(n.xattrs))+tail > inodeMaxLen {
		return layoutPlain, 0
	}
	return layoutInline, tail
}

// sortNames fixes the directory's names, size and link count.
func (n *inode) sortNames() {
	names := append(make([]string, 0, len(n.dir.entries)+2), ".", "..")
	for name := range n.dir.entries {
		names = append(names, name)
	}
	slices.Sort(names)
	n.dir.names, n.nlink, n.size = names, 2, 0
	for _, e := range n.dir.entries {
		if e.inode.isDir() {
			n.nlink++
		}
	}
	for block := range direntBlocks(names) {
		if n.size%blockSize != 0 {
			n.size = roundUp(n.size, blockSize)
		}
		n.size += int64(direntBytes(block))
	}
}

// direntBlocks cuts sorted names into runs that fit into a block each.
func direntBlocks(names []string) func(yield func([]string) bool) {
	return func(yield func([]string) bool) {
		start, used := 0, 0
		for i, name := range names {
			if used += direntSize + len(name); used > blockSize {
				if !yield(names[start:i]) {
					return
				}
				start, used = i, direntSize+len(name)
			}
		}
		yield(names[start:])
	}
}

func direntBytes(names []string) int {
	n := 0
	for _, name := range names {
		n += direntSize + len(name)
	}
	return n
}

// writeBlocks writes the whole blocks of directories and long symlinks, in the order of placing.
func writeBlocks(out *output, order []placed) error {
	for _, n := range order {
		if !n.isDir() && !n.isSymlink() {
			continue
		}
		at := int64(0)
		for data := range n.data() {
			if at += blockSize; n.layout == layoutInline && at > n.size { // the tail
				break
			}
			if _, err := out.Write(data); err != nil {
				return err
			}
			if err := out.padTo(roundUp(out.pos(), blockSize)); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeInodes writes each inode with what follows it.
func writeInodes(out *output, order []placed, meta int64) error {
	for i, n := range order {
		if err := out.padTo(meta + n.at); err != nil {
			return err
		}
		b := make([]byte, inodeSize, inodeSize+len(n.xattrs))
		n.put(b, uint32(i+1))
		if _, err := out.Write(append(b, n.xattrs...)); err != nil {
			return err
		}
		if _, err := out.Write(n.behind()); err != nil {
			return err
		}
	}
	return nil
}

// behind is what follows the inode and its attributes: a tail, or a list of chunks.
func (n placed) behind() []byte {
	switch n.layout {
	case layoutInline:
		var tail []byte
		for tail = range n.data() {
		}
		return tail
	case layoutChunks:
		b := make([]byte, 0, 4*len(n.chunks))
		for _, block := range n.chunks {
			b = le.AppendUint32(b, block)
		}
		return b
	}
	return nil
}

// data is the content of a symlink or a directory, block by block, each of which is valid until the next.
func (n placed) data() iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		if n.isSymlink() {
			yield([]byte(n.target))
			return
		}
		b := make([]byte, 0, min(n.size, blockSize))
		for names := range direntBlocks(n.dir.names) {
			b = b[:0]
			nameAt := direntSize * len(names)
			for _, name := range names {
				child := n.child(name)
				b = le.AppendUint64(b, child.nid)
				b = le.AppendUint16(b, uint16(nameAt))
				b = append(b, direntType(child.mode), 0)
				nameAt += len(name)
			}
			for _, name := range names {
				b = append(b, name...)
			}
			if !yield(b) {
				return
			}
		}
	}
}

func (n placed) child(name string) *inode {
	switch name {
	case ".":
		return n.inode
	case "..":
		return n.parent
	}
	return n.dir.entries[name].inode
}

// direntType is the kind of file as directories say it (FT_*).
func direntType(mode uint32) byte {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 1
	case unix.S_IFDIR:
		return 2
	case unix.S_IFCHR:
		return 3
	case unix.S_IFBLK:
		return 4
	case unix.S_IFIFO:
		return 5
	}
	return 7 // symlink
}
