package guestimage

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"path"
	"slices"

	"github.com/pierrec/lz4/v4"
)

// File types of a cpio entry's mode, from stat(2).
const (
	typeDir     = 0o040000
	typeRegular = 0o100000
	typeSymlink = 0o120000
	typeChar    = 0o020000
)

// entry is a file of the initramfs. Its name is relative to the root.
type entry struct {
	name         string
	mode         uint32 // type and permissions
	data         []byte // content, or a symlink's target
	major, minor uint32 // of a device
}

// tree collects the entries of the initramfs by name; parent directories are made as needed.
type tree map[string]entry

func (t tree) dir(name string, perm uint32) {
	t.add(entry{name: name, mode: typeDir | perm})
}

func (t tree) file(name string, perm uint32, data []byte) {
	t.add(entry{name: name, mode: typeRegular | perm, data: data})
}

func (t tree) symlink(name, target string) {
	t.add(entry{name: name, mode: typeSymlink | 0o777, data: []byte(target)})
}

func (t tree) char(name string, perm, major, minor uint32) {
	t.add(entry{name: name, mode: typeChar | perm, major: major, minor: minor})
}

func (t tree) add(e entry) {
	t[e.name] = e
	if parent := path.Dir(e.name); parent != "." {
		if _, ok := t[parent]; !ok {
			t.dir(parent, 0o755)
		}
	}
}

// write writes the tree in the kernel's initramfs format, cpio "newc". Equal trees give equal
// bytes: entries are sorted, times are 0 and owners root.
// Source: Documentation/driver-api/early-userspace/buffer-format.rst of the Linux kernel.
func (t tree) write(out io.Writer) error {
	entries := make([]entry, 0, len(t))
	for _, e := range t {
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b entry) int { return cmp.Compare(a.name, b.name) })
	w := &cpioWriter{w: bufio.NewWriterSize(out, 1<<20)}
	for _, e := range entries {
		w.entry(e)
	}
	w.entry(entry{name: "TRAILER!!!"})
	if w.err != nil {
		return w.err
	}
	return w.w.Flush()
}

type cpioWriter struct {
	w   *bufio.Writer
	n   int64
	ino int
	err error
}

func (w *cpioWriter) entry(e entry) {
	w.ino++
	links := 1
	if e.mode&typeDir == typeDir {
		links = 2
	}
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		w.ino, e.mode, 0, 0, links, 0, len(e.data), 0, 0, e.major, e.minor, len(e.name)+1, 0)
	w.bytes([]byte(head))
	w.bytes([]byte(e.name))
	w.bytes([]byte{0})
	w.pad()
	w.bytes(e.data)
	w.pad()
}

// pad aligns to 4 bytes.
func (w *cpioWriter) pad() { w.bytes(make([]byte, -w.n&3)) }

func (w *cpioWriter) bytes(b []byte) {
	if w.err != nil {
		return
	}
	n, err := w.w.Write(b)
	w.n += int64(n)
	w.err = err
}

// writePacked writes the tree as a legacy LZ4 frame, the one of LZ4's that the kernel knows. Even
// an emulated CPU unpacks it faster than it copies the bytes it saves.
func (t tree) writePacked(out io.Writer) error {
	var plain bytes.Buffer
	if err := t.write(&plain); err != nil {
		return err
	}
	const blockSize = 8 << 20 // but for the last, as the format has it
	if _, err := out.Write(magicLZ4); err != nil {
		return err
	}
	for plain.Len() > 0 {
		part := plain.Next(blockSize)
		block := make([]byte, 4+lz4.CompressBlockBound(len(part)))
		n, err := lz4.CompressBlock(part, block[4:], nil)
		if err != nil {
			return fmt.Errorf("compress initramfs: %w", err)
		}
		binary.LittleEndian.PutUint32(block, uint32(n))
		if _, err := out.Write(block[:4+n]); err != nil {
			return err
		}
	}
	return nil
}
