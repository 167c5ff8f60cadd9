package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"golang.org/x/sys/unix"
)

// stdio are the agent's ends of a process's input and output. Parts that are not wanted are nil.
type stdio struct {
	stdin          *os.File
	stdout, stderr *os.File
	// console is the master of the terminal, if the process has one; it is stdin and stdout at once.
	console *os.File
	// theirs are the process's own ends, until it was started.
	theirs []*os.File

	closeStdin sync.Once
}

// openPipes makes pipes for what is wanted.
func openPipes(stdin, stdout, stderr bool) (s *stdio, err error) {
	s = &stdio{theirs: make([]*os.File, 3)}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if stdin {
		if s.theirs[0], s.stdin, err = pipe(1); err != nil {
			return nil, err
		}
	}
	if stdout {
		if s.theirs[1], s.stdout, err = pipe(0); err != nil {
			return nil, err
		}
	}
	if stderr {
		if s.theirs[2], s.stderr, err = pipe(0); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// pipe makes a pipe of which one end is ours: 0 to read, 1 to write. Only ours is non-blocking, as
// programs do not expect it of theirs (and os.Pipe makes both).
func pipe(end int) (theirs, ours *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("make a pipe: %w", err)
	}
	if err := unix.SetNonblock(fds[end], true); err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[1-end]), "pipe"), os.NewFile(uintptr(fds[end]), "pipe"), nil
}

// started closes the process's ends.
func (s *stdio) started() {
	for _, f := range s.theirs {
		if f != nil {
			f.Close()
		}
	}
	s.theirs = nil
}

func (s *stdio) close() {
	s.started()
	s.endStdin()
	for _, f := range []*os.File{s.stdout, s.stderr, s.console} {
		if f != nil {
			f.Close()
		}
	}
}

// endStdin gives the process the end of its input. A terminal has none.
func (s *stdio) endStdin() {
	s.closeStdin.Do(func() {
		if s.stdin != nil {
			s.stdin.Close()
		}
	})
}

// input writes to the process. What it does not take any more is dropped.
func (s *stdio) input(p []byte) {
	w := s.stdin
	if s.console != nil {
		w = s.console
	}
	if w != nil {
		w.Write(p)
	}
}

func (s *stdio) resize(size agent.WindowSize) error {
	if s.console == nil {
		return nil
	}
	raw, err := s.console.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: size.Width, Row: size.Height})
	})
	return errors.Join(err, failed)
}

// ended says that the process is gone: what it wrote is still read, what others may write to the
// same pipes is not waited for.
func (s *stdio) ended() {
	now := time.Now()
	for _, f := range []*os.File{s.stdout, s.stderr} {
		if f != nil {
			f.SetReadDeadline(now)
		}
	}
	if s.console != nil {
		// A terminal's output takes a moment from one end to the other; then comes its end.
		s.console.SetReadDeadline(now.Add(terminalRest))
	}
}

const terminalRest = 200 * time.Millisecond

// The sizes of what is read at once, in bytes.
const (
	pieceMin = 1 << 10
	pieceMax = 32 << 10
)

// read passes on all that the process writes to one of its outputs, in pieces of at most a frame,
// until its end, or until ended was called and nothing is left.
func read(f *os.File, pass func([]byte) error) {
	buf := make([]byte, pieceMin) // most say little, and a clone copies what is touched
	for {
		n, err := f.Read(buf)
		if n > 0 && pass(buf[:n]) != nil {
			return
		}
		if n == len(buf) && n < pieceMax {
			buf = make([]byte, pieceMax)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			readRest(f, buf, pass)
			return
		}
		if err != nil {
			return // EOF, or EIO of a terminal that nobody has open any more
		}
	}
}

// readRest reads what is there without waiting.
func readRest(f *os.File, buf []byte, pass func([]byte) error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	for {
		var n int
		var failed error
		err := raw.Control(func(fd uintptr) { n, failed = unix.Read(int(fd), buf) })
		if errors.Is(failed, unix.EINTR) {
			continue
		}
		if err != nil || failed != nil || n <= 0 || pass(buf[:n]) != nil {
			return
		}
	}
}

// consoleSocket is where crun sends the master of a terminal that it made.
type consoleSocket struct {
	path string
	l    *net.UnixListener
}

func listenConsole(path string) (*consoleSocket, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for the terminal: %w", err)
	}
	return &consoleSocket{path, l}, nil
}

func (s *consoleSocket) close() { s.l.Close() }

// receive returns the master. It waits until crun has sent it or ctx ends.
func (s *consoleSocket) receive(ctx context.Context) (*os.File, error) {
	stop := context.AfterFunc(ctx, func() { s.l.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c, err := s.l.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("await the terminal: %w", err)
	}
	defer c.Close()
	stopConn := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stopConn()
	name, rights := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := c.ReadMsgUnix(name, rights)
	if err != nil || n == 0 {
		return nil, errors.Join(errors.New("await the terminal"), err, io.ErrUnexpectedEOF)
	}
	messages, err := unix.ParseSocketControlMessage(rights[:oobn])
	if err != nil || len(messages) != 1 {
		return nil, errors.New("await the terminal: a message without a descriptor")
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.New("await the terminal: a message without a descriptor")
	}
	unix.CloseOnExec(fds[0])
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}
