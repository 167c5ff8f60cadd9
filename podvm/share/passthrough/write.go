package passthrough

import (
	"errors"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Write writes at an offset, or at the file's end.
func (f *FS) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	return f.Writev(cancel, in, [][]byte{data})
}

// Writev is Write of data in pieces, which may be the guest's memory.
func (f *FS) Writev(_ <-chan struct{}, in *fuse.WriteIn, data [][]byte) (uint32, fuse.Status) {
	size := 0
	for _, piece := range data {
		size += len(piece)
	}
	if size > MaxWrite || !within(in.Offset, uint64(size)) {
		return 0, fuse.EINVAL
	}
	h, err := f.handles.get(in.Fh, regular)
	if err != nil {
		return 0, fuse.ToStatus(err)
	}
	defer h.put()
	n := 0
	err = f.changing(h.fd, in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0, func() (err error) {
		n, err = h.write(data, in)
		return err
	})
	// A program learns of an error by its next write, but pages written back have none.
	if err != nil && (n == 0 || in.WriteFlags&fuse.WRITE_CACHE != 0) {
		return 0, fuse.ToStatus(err)
	}
	return uint32(n), fuse.OK
}

// changing changes a file's content. With strip, set-user-ID and set-group-ID bits go, as Linux does
// when the caller has not CAP_FSETID: a write says so; for the rest it is who is not root.
func (f *FS) changing(fd int, strip bool, change func() error) error {
	if strip && privileged(fd) {
		return f.creds.withoutFSETID(change)
	}
	return change()
}

// privileged says whether the file has bits that a write by somebody without privileges removes.
func privileged(fd int) bool {
	var st unix.Stat_t
	if err := again(func() error { return unix.Fstat(fd, &st) }); err != nil {
		return true
	}
	const group = unix.S_ISGID | unix.S_IXGRP
	return st.Mode&unix.S_ISUID != 0 || st.Mode&group == group
}

// write returns how much of data it wrote, which is not all only with an error.
func (h *handle) write(data [][]byte, in *fuse.WriteIn) (int, error) {
	fd, flags := h.fd, 0
	opened := h.flags&unix.O_APPEND != 0
	// The flags may have changed since by fcntl. Pages written back go where they belong, by
	// whichever handle of the file the guest's kernel finds.
	switch appends := in.Flags&unix.O_APPEND != 0 && in.WriteFlags&fuse.WRITE_CACHE == 0; {
	case appends && !opened:
		flags = unix.RWF_APPEND
	case !appends && opened:
		// Linux would append nonetheless, and RWF_NOAPPEND is of Linux 6.9.
		plain, err := reopen(h.fd, h.flags&(unix.O_ACCMODE|unix.O_SYNC|unix.O_DSYNC))
		if err != nil {
			return 0, err
		}
		defer unix.Close(plain)
		fd = plain
	}
	done := 0
	for data = advance(data, 0); len(data) > 0; {
		n, err := unix.Pwritev2(fd, data[:min(len(data), maxSegments)], int64(in.Offset)+int64(done), flags)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = unix.EIO
		}
		if err != nil {
			return done, err
		}
		done += n
		data = advance(data, n)
	}
	return done, nil
}
