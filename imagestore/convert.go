package imagestore

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/caisson-vm/caisson/imagestore/erofs"
)

const (
	// zstdWindow bounds the memory that a layer can ask for, in bytes: what zstd -22 --ultra uses.
	zstdWindow = 128 << 20
	// aheadBuffers of aheadSize bytes are decompressed in advance.
	aheadBuffers, aheadSize = 20, 256 << 10
)

// convert merges layers, the bottom first, into an EROFS image in f, while they arrive, and
// returns its size. unpacked counts the bytes of the layers after decompression.
func convert(ctx context.Context, f *os.File, id digest.Digest, layers []*spool, diffIDs []digest.Digest, unpacked *atomic.Int64) (int64, error) {
	var uuid [16]byte
	copy(uuid[:], id.Encoded())
	w := erofs.NewWriter(f, uuid, erofs.Limits{})
	for i, s := range layers {
		packed := s.reader(ctx)
		err := addLayer(ctx, w, packed, diffIDs[i], unpacked)
		if err == nil || errdefs.IsInvalidArgument(err) || errdefs.IsDataLoss(err) {
			// A layer that can't be read may just have arrived damaged: that is the better reason.
			if arrived := packed.result(); arrived != nil {
				return 0, arrived
			}
		}
		if err == nil {
			continue
		}
		return 0, fmt.Errorf("layer %d of %d: %w", i+1, len(layers), err)
	}
	return w.Finish()
}

func addLayer(ctx context.Context, w *erofs.Writer, packed io.Reader, want digest.Digest, unpacked *atomic.Int64) error {
	plain, err := decompress(packed)
	if err != nil {
		return fmt.Errorf("decompress: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	digester := want.Algorithm().Digester()
	ahead := readAhead(plain, func(b []byte) {
		unpacked.Add(int64(len(b)))
		digester.Hash().Write(b) // a hash never fails
	})
	defer ahead.close()
	if err := w.AddLayer(ctx, ahead); err != nil {
		return err
	}
	// What follows the archive's end still counts for its digest.
	if err := ahead.drain(ctx); err != nil {
		return err
	}
	if got := digester.Digest(); got != want {
		return fmt.Errorf("content has digest %s, but the image's configuration says %s; the image was built or stored wrongly: %w", got, want, errdefs.ErrDataLoss)
	}
	return nil
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
	seen       func([]byte) // is shown each piece when its turn comes
	rest       []byte
	piece      []byte
	err        error // of the stream; to be read once full is closed
	quit       chan struct{}
	ended      chan struct{}
}

func readAhead(r io.ReadCloser, seen func([]byte)) *ahead {
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
	a.seen(piece)
	a.piece, a.rest = piece, piece
	return nil
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
