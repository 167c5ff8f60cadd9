// Package erofs merges the layers of an image into one read-only EROFS file system.
//
// The layers are tar archives, read once, bottom up, as streams; file content goes straight to its
// place in the image file, and only names and attributes are kept in memory until the end. The
// image is uncompressed with blocks of 4 KiB. Regular files take whole blocks (no inline tails),
// so that a guest which has the file as persistent memory maps their pages directly (DAX); runs of
// zeros take none. The same layers give the same bytes.
package erofs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"github.com/containerd/errdefs"
)

const (
	// Align is what the size of an image is a multiple of, in bytes: persistent memory devices
	// come in such units. The rest is a hole.
	Align = 2 << 20

	minChunk  = 64 << 10 // the smallest hole, and the unit of copying
	maxChunks = 1 << 16  // of one file
	buffer    = 4 << 20
)

// Limits bound what an image may ask for. Zero fields take the defaults.
type Limits struct {
	// Content is the size of all files of all layers together, holes included, in bytes.
	// Default 256 GiB.
	Content int64
	// Entries is the number of names. Default 4 Mi.
	Entries int
	// Metadata is the memory for names, symlink targets and extended attributes, in bytes.
	// Default 256 MiB.
	Metadata int
}

func (l Limits) withDefaults() Limits {
	if l.Content == 0 {
		l.Content = 256 << 30
	}
	if l.Entries == 0 {
		l.Entries = 4 << 20
	}
	if l.Metadata == 0 {
		l.Metadata = 256 << 20
	}
	// A chunk is read into the buffer as a whole, and blocks have numbers of 32 bits.
	l.Content = min(l.Content, buffer*maxChunks, (math.MaxUint32-1)*blockSize/2)
	return l
}

// Writer makes one image. It is for one goroutine.
type Writer struct {
	out   *output
	tree  *tree
	total int64
	uuid  [16]byte
}

// NewWriter returns a writer that makes an image in f, an empty file. The UUID becomes that of the
// file system.
func NewWriter(f *os.File, uuid [16]byte, limits Limits) *Writer {
	return &Writer{out: newOutput(f, buffer), tree: newTree(limits.withDefaults()), uuid: uuid}
}

// content copies a regular file's bytes into the image. Chunks of zeros become holes.
func (w *Writer) content(ctx context.Context, n *inode, r io.Reader) error {
	if w.total += n.size; n.size < 0 || w.total > w.tree.limit.Content {
		return fmt.Errorf("files of the image take more than %d bytes: %w", w.tree.limit.Content, errdefs.ErrResourceExhausted)
	}
	chunk, bits := chunkSize(n.size)
	for done := int64(0); done < n.size; done += chunk {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		size := min(chunk, n.size-done)
		padded := int(roundUp(size, blockSize))
		b, err := w.out.reserve(padded)
		if err != nil {
			return err
		}
		if _, err := io.ReadFull(r, b[:size]); err != nil {
			return contentError(err)
		}
		clear(b[size:])
		if isZero(b) {
			n.addHole(done/chunk, uint32(chunk/blockSize), bits)
			continue
		}
		block := uint32(w.out.block())
		w.out.advance(padded)
		switch {
		case n.layout == layoutChunks:
			n.chunks = append(n.chunks, block)
		case done == 0:
			n.block = block
		}
	}
	return nil
}

// addHole says that chunk number i has no blocks. Up to here the file may have been one extent.
func (n *inode) addHole(i int64, per uint32, bits uint) {
	if n.layout != layoutChunks {
		n.layout, n.chunkBits = layoutChunks, bits
		for at := range uint32(i) {
			n.chunks = append(n.chunks, n.block+at*per)
		}
	}
	n.chunks = append(n.chunks, hole)
}

// chunkSize returns the bytes of a chunk, and their logarithm, for a file of the given size.
func chunkSize(size int64) (int64, uint) {
	chunk, bits := int64(minChunk), uint(16)
	for size > chunk*maxChunks {
		chunk, bits = chunk*2, bits+1
	}
	return chunk, bits
}

func contentError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return invalid("layer ends within a file")
	}
	return readError(err)
}
