package passthrough

import (
	"errors"
	"math"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// maxCopy bounds how long one request copies. The guest asks again for the rest.
const maxCopy = 64 << 20

// within says whether size bytes at the offset are ones that a file can have.
func within(offset, size uint64) bool { return offset <= math.MaxInt64 && size <= math.MaxInt64-offset }

// Read returns what reads when the server knows where to.
func (f *FS) Read(_ <-chan struct{}, in *fuse.ReadIn, _ []byte) (fuse.ReadResult, fuse.Status) {
	if !within(in.Offset, uint64(in.Size)) {
		return nil, fuse.EINVAL
	}
	h, err := f.handles.get(in.Fh, regular)
	if err != nil {
		return nil, fuse.ToStatus(err)
	}
	return &reading{h, int64(in.Offset), int(in.Size)}, fuse.OK
}

// reading is a read to come. It holds its handle, unlike fuse.ReadResultFd: a guest that closes the
// file meanwhile must not read another that has got the descriptor's number.
type reading struct {
	h      *handle
	offset int64
	size   int
}

func (r *reading) Size() int { return r.size }

func (r *reading) Done() { r.h.put() }

func (r *reading) Bytes(buf []byte) ([]byte, fuse.Status) {
	n, code := r.Readv([][]byte{buf[:min(len(buf), r.size)]})
	return buf[:n], code
}

// Readv reads straight into the guest's memory. Less than asked for is the file's end for the guest,
// so it goes on until that; and a part is worth nothing when the rest is an error. Not so of what has
// no size, some of which can't be read twice (trace_pipe).
func (r *reading) Readv(dst [][]byte) (int, fuse.Status) {
	done := 0
	for dst = advance(dst, 0); len(dst) > 0; {
		n, err := unix.Preadv(r.h.fd, dst[:min(len(dst), maxSegments)], r.offset+int64(done))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, fuse.ToStatus(err)
		}
		if n == 0 {
			break
		}
		done += n
		if r.h.unsized {
			break
		}
		dst = advance(dst, n)
	}
	return done, fuse.OK
}

// maxSegments is what the kernel takes at once, its IOV_MAX.
const maxSegments = 1024

// advance returns what is left of the segments after n bytes.
func advance(segments [][]byte, n int) [][]byte {
	for len(segments) > 0 && n >= len(segments[0]) {
		n -= len(segments[0])
		segments = segments[1:]
	}
	if n > 0 {
		segments = append([][]byte{segments[0][n:]}, segments[1:]...)
	}
	return segments
}

// Lseek finds data or holes.
func (f *FS) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	if in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE {
		return fuse.EINVAL
	}
	if !within(in.Offset, 0) {
		return fuse.Status(unix.ENXIO)
	}
	h, err := f.handles.get(in.Fh, regular)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer h.put()
	// All reads and writes say where, so nobody minds that the descriptor's own position moves.
	at, err := unix.Seek(h.fd, int64(in.Offset), int(in.Whence))
	if err != nil {
		return fuse.ToStatus(err)
	}
	*out = fuse.LseekOut{Offset: uint64(at)}
	return fuse.OK
}

// Fallocate changes which parts of a file have space.
func (f *FS) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if !within(in.Offset, in.Length) {
		return fuse.Status(unix.EFBIG)
	}
	h, err := f.handles.get(in.Fh, regular)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer h.put()
	return fuse.ToStatus(f.changing(h.fd, in.Uid != 0, func() error {
		return again(func() error { return unix.Fallocate(h.fd, in.Mode, int64(in.Offset), int64(in.Length)) })
	}))
}

// CopyFileRange copies within the host.
func (f *FS) CopyFileRange(_ <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	if in.Flags != 0 || !within(in.OffIn, 0) || !within(in.OffOut, 0) {
		return 0, fuse.EINVAL
	}
	from, err := f.handles.get(in.FhIn, regular)
	if err != nil {
		return 0, fuse.ToStatus(err)
	}
	defer from.put()
	to, err := f.handles.get(in.FhOut, regular)
	if err != nil {
		return 0, fuse.ToStatus(err)
	}
	defer to.put()
	size := int(min(in.Len, maxCopy))
	n := 0
	err = f.changing(to.fd, in.Uid != 0, func() error {
		return again(func() (err error) {
			src, dst := int64(in.OffIn), int64(in.OffOut)
			n, err = unix.CopyFileRange(from.fd, &src, to.fd, &dst, size, 0)
			return err
		})
	})
	if err != nil {
		return 0, fuse.ToStatus(err)
	}
	return uint32(n), fuse.OK
}

// Ioctl has nothing for the guest: what a file's ioctls do on the host is not for it to ask.
func (f *FS) Ioctl(_ <-chan struct{}, _ *fuse.IoctlIn, _ []byte, _ *fuse.IoctlOut, _ []byte) fuse.Status {
	return fuse.Status(unix.ENOTTY)
}
