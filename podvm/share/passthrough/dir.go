package passthrough

import (
	"bytes"
	"encoding/binary"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	// direntBuffer is how much of a directory is read at once.
	direntBuffer = 32 << 10
	// maxKept is how much of all open directories is kept, in bytes, when it did not fit an answer.
	// What is not kept is read again.
	maxKept = 16 << 20
)

var direntBuffers = sync.Pool{New: func() any { return new([direntBuffer]byte) }}

// keptEntries counts the bytes kept of open directories.
type keptEntries struct{ size atomic.Int64 }

// dirStream is where an open directory stands.
type dirStream struct {
	dev  uint64 // of all its entries but mounts
	root uint64 // its number if it is the share's root, or 0
	// node and mount are the directory's own.
	node, mount uint64
	all         *keptEntries

	mu sync.Mutex
	// at is the cookie of the next entry to deliver, if not lost.
	at   int64
	lost bool
	// rest are entries that were read and did not fit, the first of which is at.
	rest []byte
}

func (f *FS) newDirStream(n *node, dev uint64) *dirStream {
	d := &dirStream{dev: dev, node: n.id, mount: n.ident.mount, all: &f.kept}
	if n.id == fuse.FUSE_ROOT_ID {
		d.root = n.ident.ino
	}
	return d
}

// drop forgets what is kept.
func (d *dirStream) drop() {
	d.all.size.Add(int64(-len(d.rest)))
	d.rest = nil
}

// keep copies entries for the next time, or has them read again.
func (d *dirStream) keep(fd int, entries []byte) error {
	if d.all.size.Add(int64(len(entries))) <= maxKept {
		d.rest = bytes.Clone(entries)
		return nil
	}
	d.all.size.Add(int64(-len(entries)))
	return d.seek(fd, d.at)
}

func (d *dirStream) seek(fd int, cookie int64) error {
	_, err := unix.Seek(fd, cookie, unix.SEEK_SET)
	d.at, d.lost = cookie, err != nil
	return err
}

// list gives entries from the cookie on to add, until that says that one does not fit, or there are
// no more. step is how much to read at once.
func (d *dirStream) list(fd int, cookie int64, step int, add func(fuse.DirEntry) bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	// From its begin on it is read anew, since that is what rewinddir is for.
	if cookie != d.at || cookie == 0 || d.lost {
		d.drop()
		if err := d.seek(fd, cookie); err != nil {
			return err
		}
	}
	buf := direntBuffers.Get().(*[direntBuffer]byte)
	defer direntBuffers.Put(buf)
	left := buf[:copy(buf[:], d.rest)]
	d.drop()
	for {
		for len(left) > 0 {
			e, size := parseDirent(left)
			if !add(e) {
				return d.keep(fd, left)
			}
			d.at = int64(e.Off)
			left = left[size:]
		}
		n := 0
		err := again(func() (err error) { n, err = unix.Getdents(fd, buf[:step]); return err })
		if err != nil || n == 0 {
			return err
		}
		left = buf[:n]
	}
}

// parseDirent reads the kernel's struct linux_dirent64.
func parseDirent(b []byte) (fuse.DirEntry, int) {
	size := int(binary.NativeEndian.Uint16(b[16:]))
	name := b[19:size]
	if end := bytes.IndexByte(name, 0); end >= 0 {
		name = name[:end]
	}
	return fuse.DirEntry{
		Ino: binary.NativeEndian.Uint64(b), Off: binary.NativeEndian.Uint64(b[8:]),
		Mode: uint32(b[18]) << 12, Name: string(name),
	}, size
}
