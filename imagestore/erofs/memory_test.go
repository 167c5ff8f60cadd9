package erofs

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/imagestore/internal/torture"
)

// live returns the bytes that are in use.
func live() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func newWriter(t *testing.T, limits Limits) *Writer {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return NewWriter(f, [16]byte{}, limits)
}

// many makes a layer of so many entries.
func many(n int, entry func(b *torture.Tar, i int)) []byte {
	b := torture.NewTar()
	for i := range n {
		entry(b, i)
	}
	return bytes.Clone(b.Bytes())
}

// TestMemoryIsCounted compares what layers and the tree are said to take with what they do.
func TestMemoryIsCounted(t *testing.T) {
	xattr := map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 500)}
	for name, entry := range map[string]func(*torture.Tar, int){
		"files":           func(b *torture.Tar, i int) { b.File(fmt.Sprintf("f%07d", i), "") },
		"files in tens":   func(b *torture.Tar, i int) { b.File(fmt.Sprintf("usr/lib/d%05d/f%07d", i/10, i), "") },
		"long names":      func(b *torture.Tar, i int) { b.File(fmt.Sprintf("%0200d/%0200d", i/2, i), "") },
		"directories":     func(b *torture.Tar, i int) { b.Dir(fmt.Sprintf("d%07d", i)) },
		"filled, implied": func(b *torture.Tar, i int) { b.Dir(fmt.Sprintf("d%07d/x", i)) },
		"hard links":      func(b *torture.Tar, i int) { b.File("a", ""); b.Link(fmt.Sprintf("l%07d", i), "a") },
		"symlinks":        func(b *torture.Tar, i int) { b.Symlink(fmt.Sprintf("s%07d", i), strings.Repeat("x", 100)) },
		"whiteouts":       func(b *torture.Tar, i int) { b.File(fmt.Sprintf(".wh.%07d", i), "") },
		"attributes":      func(b *torture.Tar, i int) { b.Add(tar.Header{Name: fmt.Sprint(i), PAXRecords: xattr}, "") },
	} {
		t.Run(name, func(t *testing.T) {
			layer := many(20_000, entry)
			w := newWriter(t, Limits{})
			w.giveBack(w.output()) // its buffer
			before := live()
			check := func(when string) {
				took, counted := live()-before, w.tree.held.Load()
				if took > counted+64<<10 || took < counted/2-64<<10 {
					t.Errorf("%s: %d bytes are counted, %d in use", when, counted, took)
				}
			}
			l, err := w.Read(t.Context(), bytes.NewReader(layer))
			if err != nil {
				t.Fatal(err)
			}
			check("read")
			if err := w.Apply(t.Context(), l); err != nil {
				t.Fatal(err)
			}
			check("applied")
			counted := w.tree.held.Load()
			if _, err := w.Finish(); err != nil {
				t.Fatal(err)
			}
			if took := live() - before; took > counted+64<<10 {
				t.Errorf("finished: %d bytes are counted, %d in use", counted, took)
			}
			runtime.KeepAlive(layer)
			runtime.KeepAlive(l)
		})
	}
}

// TestMemoryOfAllLayers: the limit is for the tree and the layers that are read, and what has gone is given back.
func TestMemoryOfAllLayers(t *testing.T) {
	files := many(2000, func(b *torture.Tar, i int) { b.Dir(fmt.Sprintf("d/%d", i)) })
	none := archiveOf("f d/.wh..wh..opq x\nf .wh.d x")
	w := newWriter(t, Limits{Memory: 1 << 20})
	for range 10 {
		for _, layer := range [][]byte{files, none} {
			if err := add(t.Context(), w, layer); err != nil {
				t.Fatal(err)
			}
		}
	}
	if left := w.tree.held.Load(); left > 2000 {
		t.Errorf("an empty tree is said to take %d bytes", left)
	}
	if err := add(t.Context(), w, files); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Read(t.Context(), bytes.NewReader(files)); !errdefs.IsResourceExhausted(err) {
		t.Errorf("beside the tree: %v", err)
	}
	w = newWriter(t, Limits{Memory: 1 << 20})
	if _, err := w.Read(t.Context(), bytes.NewReader(files)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Read(t.Context(), bytes.NewReader(files)); !errdefs.IsResourceExhausted(err) {
		t.Errorf("beside another layer: %v", err)
	}
	w = newWriter(t, Limits{Memory: 1 << 20})
	if err := add(t.Context(), w, many(10, func(b *torture.Tar, i int) { b.File(fmt.Sprint(i)+strings.Repeat("/x", 300), "") })); !errdefs.IsResourceExhausted(err) {
		t.Errorf("directories that no layer has: %v", err)
	}
}

// TestHeadersAreNotKept: a text of a header is a part of all its records, which may have 1 MiB.
func TestHeadersAreNotKept(t *testing.T) {
	records := map[string]string{"X.comment": strings.Repeat("x", 900_000)}
	layer := many(50, func(b *torture.Tar, i int) {
		kind := byte(tar.TypeLink)
		if i%2 == 0 {
			kind = tar.TypeSymlink
		}
		b.Add(tar.Header{Name: fmt.Sprint("\u00e9", i), Typeflag: kind, Linkname: "\u00e9", PAXRecords: records}, "")
	})
	w := newWriter(t, Limits{})
	before := live()
	l, err := w.Read(t.Context(), bytes.NewReader(layer))
	if err != nil {
		t.Fatal(err)
	}
	if took := live() - before; took > buffer+2<<20 {
		t.Errorf("%d entries take %d bytes", 50, took)
	}
	runtime.KeepAlive(layer)
	runtime.KeepAlive(l)
}
