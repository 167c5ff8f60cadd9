// Package tail keeps the last of what a process writes: a guest's console, a VMM's log. A guest can
// write to both without end, so the files that hold them must not grow.
//
// The process writes to a named pipe; the daemon moves what comes through it to a file of bounded
// size. While no daemon runs, the pipe keeps what fits and the rest is lost; nobody blocks.
package tail

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// fileMax is how large the file may grow; then its older half goes. tailMax is how much String
// returns. Both in bytes.
const (
	fileMax = 64 << 10
	tailMax = 1 << 10
)

// Log is one log.
type Log struct {
	path string
	pipe *os.File
	drop []string

	mu   sync.Mutex
	file *os.File
	size int64
	line []byte // the last one, unfinished, where lines are dropped
}

// PipePath is where the process writes to that logs to path.
func PipePath(path string) string { return path + ".pipe" }

// Open makes or finds the pipe, and goes on with the file. Lines that contain one of drop are not kept.
func Open(path string, drop ...string) (*Log, error) {
	if err := unix.Mkfifo(PipePath(path), 0o600); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("log %s: %w", path, err)
	}
	pipe, err := openPipe(path)
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		pipe.Close()
		return nil, fmt.Errorf("log %s: %w", path, err)
	}
	info, err := file.Stat()
	if err != nil {
		pipe.Close()
		file.Close()
		return nil, fmt.Errorf("log %s: %w", path, err)
	}
	l := &Log{path: path, pipe: pipe, drop: drop, file: file, size: info.Size()}
	go l.run()
	return l, nil
}

// openPipe opens it for both reading and writing: who does so is neither told that the other end
// has gone nor waits for it to come.
func openPipe(path string) (*os.File, error) {
	f, err := os.OpenFile(PipePath(path), os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("log %s: %w", path, err)
	}
	return f, nil
}

// Writer opens the end that a process gets as its standard output; the caller closes it. A full
// pipe makes writes fail rather than wait.
func (l *Log) Writer() (*os.File, error) { return openPipe(l.path) }

// run moves what arrives until the log is closed.
func (l *Log) run() {
	raw, err := l.pipe.SyscallConn()
	if err != nil {
		return // closed
	}
	for err == nil {
		err = raw.Read(func(fd uintptr) bool { return l.drain(int(fd)) > 0 })
	}
}

// drain moves what is in the pipe and returns how many bytes that was.
func (l *Log) drain(fd int) (moved int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for buf := make([]byte, 4<<10); ; {
		n, err := unix.Read(fd, buf)
		if n <= 0 || err != nil {
			return moved
		}
		moved += n
		l.takeLocked(buf[:n])
	}
}

// lineMax is how much of a line is looked at before it is kept or dropped, in bytes.
const lineMax = 4 << 10

// takeLocked takes what was written, but for lines to be dropped.
func (l *Log) takeLocked(b []byte) {
	if len(l.drop) == 0 {
		l.appendLocked(b)
		return
	}
	l.line = append(l.line, b...)
	n := bytes.LastIndexByte(l.line, '\n') + 1
	if len(l.line)-n >= lineMax {
		n = len(l.line)
	}
	l.siftLocked(n)
}

// siftLocked keeps or drops each of the lines in the first n bytes that wait.
func (l *Log) siftLocked(n int) {
	var kept []byte
	for line := range bytes.Lines(l.line[:n]) {
		if !slices.ContainsFunc(l.drop, func(word string) bool { return bytes.Contains(line, []byte(word)) }) {
			kept = append(kept, line...)
		}
	}
	l.line = slices.Clone(l.line[n:])
	if len(kept) > 0 {
		l.appendLocked(kept)
	}
}

// flush takes all that was written by now, the unfinished line too.
func (l *Log) flush() {
	if raw, err := l.pipe.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { l.drain(int(fd)) })
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.siftLocked(len(l.line))
}

// appendLocked writes to the file. What the disk has no room for is lost, as with any log.
func (l *Log) appendLocked(b []byte) {
	if l.size+int64(len(b)) > fileMax {
		keep := make([]byte, fileMax/2)
		n, _ := l.file.ReadAt(keep, max(0, l.size-int64(len(keep))))
		l.file.Truncate(0)
		n, _ = l.file.Write(keep[:n])
		l.size = int64(n)
	}
	n, _ := l.file.Write(b)
	l.size += int64(n)
}

// String is the end of the log, all that was written before the call.
func (l *Log) String() string {
	l.flush()
	return Read(l.path)
}

// Close ends the moving, after what is in the pipe. The file stays, the pipe goes when it is removed.
func (l *Log) Close() error {
	l.flush()
	err := l.pipe.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	return errors.Join(err, l.file.Close())
}

// Read returns the end of a log file, "" if there is none.
func Read(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > tailMax {
		f.Seek(-tailMax, io.SeekEnd)
	}
	text, _ := io.ReadAll(io.LimitReader(f, tailMax))
	return strings.ToValidUTF8(strings.TrimSpace(string(text)), "?")
}
