package erofs

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// holeBlocks is the shortest run of zero blocks that is left out of the file. Shorter ones are
// written: an extent of the host's file system costs more than they do.
const holeBlocks = 4

var zeros [blockSize]byte

// space hands out the image file's blocks, in regions for those who write at the same time.
type space struct {
	mu   sync.Mutex
	next int64 // the first byte that is nobody's
}

// Regions grow with the image, so that what is left of the last ones is little of it.
const (
	regionShare          = 16
	minRegion, maxRegion = 256 << 10, 4 << 20
)

// take returns where the next region begins and how long it is, at least n bytes.
func (s *space) take(n int64) (start, length int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	start = s.next
	length = max(n, min(roundUp(start/regionShare, minRegion), maxRegion))
	s.next += length
	return start, length
}

// output writes to the image file, front to back within its regions. Blocks of zeros are not written.
type output struct {
	f     *os.File
	space *space
	buf   []byte // [0:n] is not yet in the file
	n     int
	off   int64 // of buf[0] in the file, a multiple of the block size
	end   int64 // of the region
}

// pos is the file offset at which the next byte goes.
func (o *output) pos() int64 { return o.off + int64(o.n) }

// block is the number of the block that starts at pos, which is a multiple of the block size.
func (o *output) block() int64 { return o.pos() / blockSize }

// reserve returns the next n bytes of the image, whole blocks at the start of one, for the caller to
// fill; advance makes them part of it. They follow those before, unless a new region was needed. n is at
// most the size of the buffer; the content of the bytes is undefined.
func (o *output) reserve(n int) ([]byte, error) {
	if o.pos()+int64(n) > o.end {
		if err := o.grow(int64(n)); err != nil {
			return nil, err
		}
	}
	if o.n+n > len(o.buf) {
		if err := o.flush(); err != nil {
			return nil, err
		}
	}
	return o.buf[o.n : o.n+n], nil
}

// grow gets a region for n bytes, behind the present one if nobody else has that.
func (o *output) grow(n int64) error {
	start, length := o.space.take(n)
	if start != o.end {
		if err := o.flush(); err != nil {
			return err
		}
		o.off = start
	}
	o.end = start + length
	return nil
}

func (o *output) advance(n int) { o.n += n }

// Write appends p, wherever the region ends: nobody else writes any more.
func (o *output) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		if o.n == len(o.buf) {
			if err := o.flush(); err != nil {
				return 0, err
			}
		}
		n := copy(o.buf[o.n:], rest)
		o.n += n
		rest = rest[n:]
	}
	return len(p), nil
}

// padTo appends zeros up to the file offset pos.
func (o *output) padTo(pos int64) error {
	for o.pos() < pos {
		if _, err := o.Write(zeros[:min(blockSize, pos-o.pos())]); err != nil {
			return err
		}
	}
	return nil
}

// flush writes the whole blocks of the buffer and keeps the rest.
func (o *output) flush() error {
	whole := o.n / blockSize * blockSize
	for at := 0; at < whole; {
		end := dataEnd(o.buf[at:whole])
		if end == 0 {
			at += zeroEnd(o.buf[at:whole])
			continue
		}
		if _, err := o.f.WriteAt(o.buf[at:at+end], o.off+int64(at)); err != nil {
			return fmt.Errorf("write image: %w", err)
		}
		at += end
	}
	if whole > 0 {
		// Start the disk now, so that the final sync has little left to wait for. It is a hint:
		// file systems that can't do it lose nothing.
		_ = unix.SyncFileRange(int(o.f.Fd()), o.off, int64(whole), unix.SYNC_FILE_RANGE_WRITE)
	}
	o.n = copy(o.buf, o.buf[whole:o.n])
	o.off += int64(whole)
	return nil
}

// dataEnd returns how many bytes of b come before a run of zero blocks worth leaving out.
func dataEnd(b []byte) int {
	run := 0
	for at := 0; at < len(b); at += blockSize {
		if !isZero(b[at : at+blockSize]) {
			run = 0
			continue
		}
		run++
		if run == holeBlocks {
			return at + blockSize - run*blockSize
		}
	}
	return len(b)
}

// zeroEnd returns how many bytes of b come before the first block with data.
func zeroEnd(b []byte) int {
	at := 0
	for at < len(b) && isZero(b[at:at+blockSize]) {
		at += blockSize
	}
	return at
}

// isZero tells whether b, whole blocks of it, holds nothing but zeros.
func isZero(b []byte) bool {
	for len(b) > 0 {
		if le.Uint64(b) != 0 || !bytes.Equal(b[:blockSize], zeros[:]) {
			return false
		}
		b = b[blockSize:]
	}
	return true
}

// punch gives the space of blocks that no file uses any more back to the host.
func (o *output) punch(dead []extent) error {
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	for _, e := range dead {
		err := unix.Fallocate(int(o.f.Fd()), mode, int64(e.block)*blockSize, int64(e.count)*blockSize)
		if err == unix.EOPNOTSUPP {
			return nil // the host's file system can't: the image is right, only bigger
		}
		if err != nil {
			return fmt.Errorf("free space of image: %w", err)
		}
	}
	return nil
}

var _ io.Writer = (*output)(nil)
