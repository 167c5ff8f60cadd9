// Package erofs merges the layers of an image into one read-only EROFS file system.
//
// The layers are tar archives, read once, as streams, several at once; file content goes straight to
// its place in the image file, and only names and attributes are kept in memory until the end. The
// image is uncompressed with blocks of 4 KiB. Regular files take whole blocks (no inline tails),
// so that a guest which has the file as persistent memory maps their pages directly (DAX); runs of
// zeros take none. The same layers give the same files, and the same bytes if they are read one
// after another.
package erofs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"sync/atomic"

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
	// Memory is what names and attributes take, of the image and of the layers that are read and not yet applied,
	// in bytes. Default 768 MiB: some two million files.
	Memory int64
	// Entries is the number of entries of all layers together. Default 8 Mi.
	Entries int
	// Steps is the number of directories passed on the way through the paths of all layers together, symlinks
	// included. Default 256 Mi: 32 for each entry.
	Steps int
}

func (l Limits) withDefaults() Limits {
	if l.Content == 0 {
		l.Content = 256 << 30
	}
	if l.Entries == 0 {
		l.Entries = 8 << 20
	}
	if l.Steps == 0 {
		l.Steps = 256 << 20
	}
	if l.Memory == 0 {
		l.Memory = 768 << 20
	}
	// A chunk is read into the buffer as a whole, and blocks have numbers of 32 bits.
	l.Content = min(l.Content, buffer*maxChunks, (math.MaxUint32-1)*blockSize/2)
	return l
}

// Writer makes one image. Its layers may be read at the same time (see Read); all else is for one
// goroutine.
type Writer struct {
	f       *os.File
	tree    *tree
	uuid    [16]byte
	space   space
	total   atomic.Int64 // bytes of all files of all layers
	entries atomic.Int64 // of all layers

	mu   sync.Mutex
	idle []*output // that no layer has at the moment
}

// NewWriter returns a writer that makes an image in f, an empty file. The UUID becomes that of the
// file system.
func NewWriter(f *os.File, uuid [16]byte, limits Limits) *Writer {
	return &Writer{f: f, tree: newTree(limits.withDefaults()), uuid: uuid, space: space{next: blockSize}}
}

// output lends an output, until it is given back to idle.
func (w *Writer) output() *output {
	w.mu.Lock()
	defer w.mu.Unlock()
	if last := len(w.idle) - 1; last >= 0 {
		o := w.idle[last]
		w.idle = w.idle[:last]
		return o
	}
	return &output{f: w.f, space: &w.space, buf: make([]byte, buffer)}
}

func (w *Writer) giveBack(o *output) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.idle = append(w.idle, o)
}

// last returns the output for what comes behind all content. The others have written theirs.
func (w *Writer) last() (*output, error) {
	o := w.output()
	for _, other := range w.idle {
		if other.end > o.end {
			o, other = other, o
		}
		if err := other.flush(); err != nil {
			return nil, err
		}
	}
	w.idle = nil
	if o.end < w.space.next {
		return o, o.grow(0)
	}
	return o, nil
}

// content copies a regular file's bytes into the image. Chunks of zeros become holes.
func (l *Layer) content(ctx context.Context, n *inode, r io.Reader) error {
	limit := l.w.tree.limit.Content
	if n.size < 0 || n.size > limit || l.w.total.Add(n.size) > limit {
		return fmt.Errorf("files of the image take more than %d bytes: %w", limit, errdefs.ErrResourceExhausted)
	}
	chunk, bits := chunkSize(n.size)
	for done := int64(0); done < n.size; done += chunk {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		size := min(chunk, n.size-done)
		padded := int(roundUp(size, blockSize))
		b, err := l.out.reserve(padded)
		if err != nil {
			return err
		}
		if _, err := io.ReadFull(r, b[:size]); err != nil {
			return contentError(err)
		}
		clear(b[size:])
		if isZero(b) {
			n.addChunk(done/chunk, hole, bits)
			continue
		}
		n.addChunk(done/chunk, uint32(l.out.block()), bits)
		l.out.advance(padded)
	}
	return nil
}

// addChunk says where chunk number i of the file is. As long as each follows the one before, the file is
// one extent.
func (n *inode) addChunk(i int64, block uint32, bits uint) {
	per := uint32(1) << (bits - blockBits)
	if n.layout != layoutChunks {
		switch {
		case block == hole:
		case i == 0:
			n.block = block
			return
		case block == n.block+uint32(i)*per:
			return
		}
		n.layout, n.chunkBits = layoutChunks, bits
		for at := range uint32(i) {
			n.chunks = append(n.chunks, n.block+at*per)
		}
	}
	n.chunks = append(n.chunks, block)
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
