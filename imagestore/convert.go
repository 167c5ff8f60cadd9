package imagestore

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/caisson-vm/caisson/imagestore/erofs"
)

const (
	// zstdWindow bounds the memory that a layer can ask for, in bytes: what zstd -22 --ultra uses.
	zstdWindow = 128 << 20
	// aheadBuffers of aheadSize bytes are decompressed in advance.
	aheadBuffers, aheadSize = 8, 256 << 10
	// maxBytes bounds the layers of an image together, in bytes, packed and unpacked: as much content as
	// erofs.Limits allow, and 2 KiB more for each entry. A layer that is named twice counts twice.
	maxBytes = (256 + 16) << 30
)

// convert merges layers, the bottom first, into an EROFS image in f, while they arrive, and
// returns its size. unpacked counts the bytes of the layers after decompression.
func convert(ctx context.Context, f *os.File, id digest.Digest, layers []*spool, diffIDs []digest.Digest, unpacked *atomic.Int64) (int64, error) {
	var uuid [16]byte
	copy(uuid[:], id.Encoded())
	c := converter{w: erofs.NewWriter(f, uuid, erofs.Limits{}), layers: layers, diffIDs: diffIDs, unpacked: unpacked, limit: maxBytes}
	if err := c.merge(ctx); err != nil {
		return 0, err
	}
	return c.w.Finish()
}

// parallelLayers are read at a time, as decompression takes most of a pull: more would need more memory than
// a pull is to have. No more are kept until those below them have been applied, either: they have one bound of
// memory with the image (erofs.Limits).
const parallelLayers = 2

type converter struct {
	w        *erofs.Writer
	layers   []*spool
	diffIDs  []digest.Digest // of the layers
	unpacked *atomic.Int64
	limit    int64 // of unpacked
}

// merge reads layers, some at once, and applies them in their order. turns has a channel for each layer,
// in that order, on which it comes when it has been read.
func (c *converter) merge(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	turns := make(chan chan *erofs.Layer, parallelLayers-1) // and one is applied
	g.Go(func() error {
		defer close(turns)
		return c.readAll(ctx, g, turns)
	})
	g.Go(func() error { return c.applyAll(ctx, turns) })
	return g.Wait()
}

func (c *converter) readAll(ctx context.Context, g *errgroup.Group, turns chan<- chan *erofs.Layer) error {
	busy := make(chan struct{}, min(parallelLayers, runtime.GOMAXPROCS(0)))
	for i := range c.layers {
		turn := make(chan *erofs.Layer, 1)
		if err := send(ctx, turns, turn); err != nil {
			return err
		}
		if err := send(ctx, busy, struct{}{}); err != nil {
			return err
		}
		g.Go(func() error {
			l, err := c.read(ctx, i)
			if err != nil {
				return err
			}
			turn <- l
			<-busy
			return nil
		})
	}
	return nil
}

func (c *converter) applyAll(ctx context.Context, turns <-chan chan *erofs.Layer) error {
	i := 0
	for turn := range turns {
		select {
		case l := <-turn:
			if err := c.w.Apply(ctx, l); err != nil {
				return c.wrap(i, err)
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		i++
	}
	return nil
}

// send waits until v is taken, or ctx ends.
func send[T any](ctx context.Context, to chan<- T, v T) error {
	select {
	case to <- v:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// wrap says that an error is of layer i.
func (c *converter) wrap(i int, err error) error {
	return fmt.Errorf("layer %d of %d: %w", i+1, len(c.layers), err)
}

// read reads layer i and checks its digest.
func (c *converter) read(ctx context.Context, i int) (*erofs.Layer, error) {
	packed := c.layers[i].reader(ctx)
	l, err := c.readPlain(ctx, packed, c.diffIDs[i])
	if err == nil || errdefs.IsInvalidArgument(err) || errdefs.IsDataLoss(err) {
		// A layer that can't be read may just have arrived damaged: that is the better reason.
		if arrived := packed.result(); arrived != nil {
			return nil, arrived
		}
	}
	if err != nil {
		return nil, c.wrap(i, err)
	}
	return l, nil
}

func (c *converter) readPlain(ctx context.Context, packed io.Reader, want digest.Digest) (*erofs.Layer, error) {
	plain, err := decompress(packed)
	if err != nil {
		return nil, fmt.Errorf("decompress: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	digester := want.Algorithm().Digester()
	ahead := readAhead(plain, func(b []byte) error {
		if c.unpacked.Add(int64(len(b))) > c.limit {
			return fmt.Errorf("layers of the image have more than %d bytes together when they are unpacked; keep data in a volume: %w", c.limit, errdefs.ErrResourceExhausted)
		}
		digester.Hash().Write(b) // a hash never fails
		return nil
	})
	defer ahead.close()
	l, err := c.w.Read(ctx, ahead)
	if err != nil {
		return nil, err
	}
	// What follows the archive's end still counts for its digest.
	if err := ahead.drain(ctx); err != nil {
		return nil, err
	}
	if got := digester.Digest(); got != want {
		return nil, fmt.Errorf("content has digest %s, but the image's configuration says %s; the image was built or stored wrongly: %w", got, want, errdefs.ErrDataLoss)
	}
	return l, nil
}

// decompress reads gzip, zstd (zstd:chunked too) or neither, by what the stream starts with:
// media types are often wrong, and the digest of the content is checked in any case.
func decompress(r io.Reader) (io.ReadCloser, error) {
	in := bufio.NewReaderSize(r, aheadSize)
	magic, err := in.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1F, 0x8B}):
		return gzip.NewReader(in)
	case bytes.Equal(magic, []byte{0x28, 0xB5, 0x2F, 0xFD}), len(magic) == 4 && magic[0]&0xF0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2A, 0x4D, 0x18}):
		d, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(in), nil
}

// ahead reads from a stream in a goroutine of its own, so that decompression does not wait for
// those who use its result.
type ahead struct {
	full, free chan []byte
	seen       func([]byte) error // is shown each piece when its turn comes
	rest       []byte
	piece      []byte
	err        error // of the stream; to be read once full is closed
	quit       chan struct{}
	ended      chan struct{}
}

func readAhead(r io.ReadCloser, seen func([]byte) error) *ahead {
	a := &ahead{full: make(chan []byte, aheadBuffers), free: make(chan []byte, aheadBuffers), seen: seen,
		quit: make(chan struct{}), ended: make(chan struct{})}
	for range aheadBuffers {
		a.free <- make([]byte, aheadSize)
	}
	go a.fill(r)
	return a
}

func (a *ahead) fill(r io.ReadCloser) {
	defer close(a.ended)
	defer r.Close() // a reader: nothing to lose
	defer close(a.full)
	for {
		select {
		case <-a.quit:
			return
		case buf := <-a.free:
			n, err := fillBuffer(r, buf[:aheadSize])
			if n > 0 {
				a.full <- buf[:n]
			}
			if err == io.EOF {
				a.err = err
				return
			}
			if err != nil {
				a.err = fmt.Errorf("decompress: %w: %w", err, errdefs.ErrInvalidArgument)
				return
			}
		}
	}
}

// fillBuffer reads until buf is full or the stream ends, and leaves the stream's error as it is.
func fillBuffer(r io.Reader, buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		var more int
		more, err = r.Read(buf[n:])
		n += more
	}
	return n, err
}

// next gets the next piece of the stream.
func (a *ahead) next() error {
	if a.piece != nil {
		a.free <- a.piece
		a.piece = nil
	}
	piece, ok := <-a.full
	if !ok {
		return a.err
	}
	a.piece, a.rest = piece, piece
	return a.seen(piece)
}

func (a *ahead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if err := a.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// drain reads what is left.
func (a *ahead) drain(ctx context.Context) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := a.next(); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// close ends the goroutine. The stream below must end, too, for it waits for that.
func (a *ahead) close() {
	close(a.quit)
	<-a.ended
}
