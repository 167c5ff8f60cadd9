package podvm

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// logWriter writes a container's records to its CRI log, each exactly once whatever kills the
// daemon. The position says up to which record, and which size of the file, the log has certainly
// come. What the file has beyond that size was written by a daemon that died, or met a full disk,
// before it noted so: whole lines count as written, and a torn one is cut off and comes again.
type logWriter struct {
	path string // "": there is no log, records are only counted

	mu       sync.Mutex
	file     *os.File
	note     *os.File // the position
	position position
	noted    position // what the note says
	torn     bool     // the file may have more than the position says
	made     bool     // it made the file
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
	var err error
	if w.note, err = os.OpenFile(note, os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("container log: %w", noSpace(err, note))
	}
	if err := w.open(); err != nil {
		w.note.Close()
		return nil, err
	}
	if err := w.resume(); err != nil {
		w.closeFiles()
		return nil, err
	}
	return w, nil
}

func (w *logWriter) open() error {
	if w.path == "" {
		return nil
	}
	// A link in the file's place was not made by the kubelet.
	const flags = os.O_CREATE | os.O_RDWR | os.O_APPEND | unix.O_NOFOLLOW
	f, err := os.OpenFile(w.path, flags|os.O_EXCL, 0o640)
	w.made = err == nil
	if errors.Is(err, fs.ErrExist) {
		f, err = os.OpenFile(w.path, flags, 0o640)
	}
	if err != nil {
		return fmt.Errorf("container log: %w", noSpace(err, w.path))
	}
	w.file = f
	return nil
}

// resume goes on where a former daemon was, in its file or, if that was rotated, in the new one. A
// new log begins at the end of its file, which is noted before the first line is written.
func (w *logWriter) resume() error {
	var b [positionSize]byte
	n, err := w.note.ReadAt(b[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("container log: position: %w", err)
	}
	if n == positionSize && crc32.ChecksumIEEE(b[:24]) == binary.BigEndian.Uint32(b[24:]) {
		w.noted = position{binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:])}
	}
	w.position = w.noted
	if w.path == "" {
		return nil
	}
	size, inode, err := identify(w.file)
	if err != nil {
		return err
	}
	if inode == w.position.Inode {
		return w.settle(w.file)
	}
	if old := w.rotated(); old != nil {
		err := w.settle(old)
		old.Close()
		if err != nil {
			return err
		}
	}
	w.position.Size, w.position.Inode = uint64(size), inode
	return w.save()
}

// rotated opens the file that the position speaks of under the name that the kubelet gave it.
func (w *logWriter) rotated() *os.File {
	names, err := filepath.Glob(w.path + ".*")
	if err != nil || w.position.Inode == 0 {
		return nil
	}
	for _, name := range names {
		f, err := os.OpenFile(name, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		if _, inode, err := identify(f); err == nil && inode == w.position.Inode {
			return f
		}
		f.Close()
	}
	return nil
}

func identify(f *os.File) (size int64, inode uint64, err error) {
	info, err := f.Stat()
	if err != nil {
		return 0, 0, fmt.Errorf("container log: %w", err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		inode = st.Ino
	}
	return info.Size(), inode, nil
}

// settle takes the lines that the file has beyond the position as written, and cuts off a torn one.
func (w *logWriter) settle(f *os.File) error {
	size, _, err := identify(f)
	if err != nil {
		return err
	}
	w.position.Size = min(w.position.Size, uint64(size)) // it may have been emptied
	r := bufio.NewReader(io.NewSectionReader(f, int64(w.position.Size), size-int64(w.position.Size)))
	for {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("container log: %w", err)
		}
		if head := lineHead(line); head >= 0 { // else it is none of ours
			w.position.Offset += agent.RecordSize(len(line) - head - 1)
		}
		w.position.Size += uint64(len(line))
	}
	if uint64(size) > w.position.Size {
		if err := f.Truncate(int64(w.position.Size)); err != nil {
			return fmt.Errorf("container log: cut off a torn line: %w", err)
		}
	}
	w.torn = false
	return nil
}

// offset is that of the first record which the log does not have for certain.
func (w *logWriter) offset() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.position.Offset
}

// write writes what the log does not have yet of a batch, and returns up to where it may be
// acknowledged. When it fails the batch is to be given again.
func (w *logWriter) write(batch []agent.Record) (ack uint64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.torn {
		if err := w.settle(w.file); err != nil {
			return 0, err
		}
	}
	lines, next := w.buf[:0], w.position
	for _, r := range batch {
		if r.Offset < next.Offset {
			continue
		}
		next.Offset = r.Offset + agent.RecordSize(len(r.Line))
		if w.path != "" {
			lines = appendLine(lines, r)
		}
	}
	if w.buf = lines; cap(lines) > bufferKept {
		w.buf = nil
	}
	next.Size += uint64(len(lines))
	if len(lines) > 0 {
		if _, err := w.file.Write(lines); err != nil {
			w.torn = true
			return 0, fmt.Errorf("container log: %w", noSpace(err, w.path))
		}
	}
	w.position = next
	return next.Offset, w.save()
}

// bufferKept is the largest buffer that a log keeps between batches, in bytes.
const bufferKept = 64 << 10

// save notes the position, if the note is another.
func (w *logWriter) save() error {
	p := w.position
	if p == w.noted {
		return nil
	}
	b := make([]byte, 0, positionSize)
	b = binary.BigEndian.AppendUint64(b, p.Offset)
	b = binary.BigEndian.AppendUint64(b, p.Size)
	b = binary.BigEndian.AppendUint64(b, p.Inode)
	b = binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
	if _, err := w.note.WriteAt(b, 0); err != nil {
		return fmt.Errorf("container log: position: %w", noSpace(err, w.note.Name()))
	}
	w.noted = p
	return nil
}

// reopen goes on with a new file: the old one was renamed. When it fails it goes on with the old.
func (w *logWriter) reopen() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.path == "" {
		return nil
	}
	if w.torn {
		if err := w.settle(w.file); err != nil {
			return err
		}
	}
	old, before := w.file, w.position
	if err := w.open(); err != nil {
		return err
	}
	size, inode, err := identify(w.file)
	if err == nil && inode != before.Inode { // else nobody renamed it
		w.position.Size, w.position.Inode = uint64(size), inode
		err = w.save()
	}
	if err != nil {
		err = errors.Join(err, w.file.Close())
		w.file, w.position = old, before
		return err
	}
	return old.Close()
}

// discard closes the log of a container that was not made. The kubelet counts the restarts of one that it finds
// no record of by the files of their logs.
func (w *logWriter) discard() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var err error
	if w.made && w.position.Size == 0 {
		err = os.Remove(w.path)
	}
	return errors.Join(err, w.closeFiles())
}

// close is idempotent.
func (w *logWriter) close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.closeFiles()
}

func (w *logWriter) closeFiles() error {
	var errs []error
	for _, f := range []*os.File{w.file, w.note} {
		if f == nil {
			continue
		}
		if err := f.Close(); !errors.Is(err, fs.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// appendLine appends a record as a line of the CRI's log format. A newline inside of it, which an
// honest agent does not send, becomes a space: it would be a line of its own, in another's name.
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
	start := len(b)
	b = append(b, r.Line...)
	for i := bytes.IndexByte(b[start:], '\n'); i >= 0; i = bytes.IndexByte(b[start:], '\n') {
		b[start+i] = ' '
		start += i + 1
	}
	return append(b, '\n')
}

// lineHead is how many bytes of a log's line stand before what the container wrote: time, stream and
// tag, each with a space. It is negative for what is no such line.
func lineHead(line []byte) int {
	head := 0
	for range 3 {
		i := bytes.IndexByte(line[head:], ' ')
		if i < 0 {
			return -1
		}
		head += i + 1
	}
	return head
}
