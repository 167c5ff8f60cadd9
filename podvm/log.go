package podvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// logWriter writes a container's records to its CRI log, each exactly once whatever kills the
// daemon. The log is a function of the records; the position says up to which record, and which
// size of the file, it has certainly come. What the file has beyond that size was written by a
// daemon that died before it noted so, and is skipped when the same records come again.
type logWriter struct {
	path string // "": there is no log, records are only counted

	mu       sync.Mutex
	file     *os.File
	note     *os.File // the position
	position position
	skip     int64 // bytes that the file has already
	buf      []byte
}

// position is where a log stands.
type position struct {
	Offset uint64 // of the next record
	Size   uint64 // of the file that has the records before it
	Inode  uint64 // of that file: after a rotation it is another
}

const positionSize = 3*8 + 4

func newLogWriter(path, note string) (*logWriter, error) {
	w := &logWriter{path: path}
	if path == "" {
		return w, nil
	}
	var err error
	if w.note, err = os.OpenFile(note, os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("container log: %w", noSpace(err, note))
	}
	if err := w.open(); err != nil {
		w.note.Close()
		return nil, err
	}
	w.resume()
	return w, nil
}

func (w *logWriter) open() error {
	f, err := os.OpenFile(w.path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o640)
	if err != nil {
		return fmt.Errorf("container log: %w", noSpace(err, w.path))
	}
	w.file = f
	return nil
}

// resume goes on where a former daemon was. A file that was rotated meanwhile has none of the
// records that come.
func (w *logWriter) resume() {
	var b [positionSize]byte
	n, _ := w.note.ReadAt(b[:], 0)
	if n == positionSize && crc32.ChecksumIEEE(b[:24]) == binary.BigEndian.Uint32(b[24:]) {
		w.position = position{binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:])}
	}
	size, inode := identify(w.file)
	if inode == w.position.Inode {
		w.skip = max(0, size-int64(w.position.Size))
	} else {
		w.position.Size, w.position.Inode = uint64(size), inode
	}
}

func identify(f *os.File) (size int64, inode uint64) {
	info, err := f.Stat()
	if err != nil {
		return 0, 0
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		inode = st.Ino
	}
	return info.Size(), inode
}

// offset is that of the first record which the log does not have for certain.
func (w *logWriter) offset() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.position.Offset
}

// write writes a batch and returns up to where it may be acknowledged. When it fails the batch may
// be given again.
func (w *logWriter) write(batch []agent.Record) (ack uint64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(batch) == 0 {
		return w.position.Offset, nil
	}
	last := batch[len(batch)-1]
	next := last.Offset + agent.RecordSize(len(last.Line))
	if w.path == "" {
		w.position.Offset = next
		return next, nil
	}
	w.buf = w.buf[:0]
	for _, r := range batch {
		w.buf = appendLine(w.buf, r)
	}
	lines := w.buf
	have := min(w.skip, int64(len(lines)))
	if n, err := w.file.Write(lines[have:]); err != nil {
		w.skip = have + int64(n) // they are there when the batch comes again
		return 0, fmt.Errorf("container log: %w", noSpace(err, w.path))
	}
	to := position{next, w.position.Size + uint64(len(lines)), w.position.Inode}
	if err := w.save(to); err != nil {
		w.skip = max(w.skip, int64(len(lines)))
		return 0, err
	}
	w.skip = max(0, w.skip-int64(len(lines)))
	w.position = to
	return next, nil
}

func (w *logWriter) save(p position) error {
	b := make([]byte, 0, positionSize)
	b = binary.BigEndian.AppendUint64(b, p.Offset)
	b = binary.BigEndian.AppendUint64(b, p.Size)
	b = binary.BigEndian.AppendUint64(b, p.Inode)
	b = binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
	if _, err := w.note.WriteAt(b, 0); err != nil {
		return fmt.Errorf("container log: position: %w", noSpace(err, w.note.Name()))
	}
	return nil
}

// reopen goes on with a new file: the old one was renamed.
func (w *logWriter) reopen() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.path == "" {
		return nil
	}
	old := w.file
	if err := w.open(); err != nil {
		w.file = old
		return err
	}
	size, inode := identify(w.file)
	p := position{w.position.Offset, uint64(size), inode}
	if inode == w.position.Inode { // nobody renamed it
		p.Size = w.position.Size
	}
	if err := w.save(p); err != nil {
		err = errors.Join(err, w.file.Close())
		w.file = old
		return err
	}
	if inode != w.position.Inode {
		w.skip = 0
	}
	w.position = p
	return old.Close()
}

func (w *logWriter) close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.path == "" {
		return nil
	}
	err := errors.Join(w.file.Close(), w.note.Close())
	if errors.Is(err, fs.ErrClosed) {
		return nil
	}
	return err
}

// appendLine appends a record as a line of the CRI's log format.
// Source: kubernetes, pkg/kubelet/kuberuntime/logs.
func appendLine(b []byte, r agent.Record) []byte {
	b = time.Unix(0, r.Time).UTC().AppendFormat(b, time.RFC3339Nano)
	if r.Stderr {
		b = append(b, " stderr "...)
	} else {
		b = append(b, " stdout "...)
	}
	if r.Partial {
		b = append(b, "P "...)
	} else {
		b = append(b, "F "...)
	}
	return append(append(b, r.Line...), '\n')
}
