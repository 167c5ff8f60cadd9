package serialmux

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"testing"

	"github.com/hashicorp/yamux"
)

// hostile is a session with a guest that says hello and then does as the test likes.
func hostile(t *testing.T, guest func(mux *yamux.Session)) *Session {
	t.Helper()
	return hostilePort(t, func(r io.Reader, port net.Conn) {
		if mux, err := yamux.Server(buffered{r, port}, config()); err == nil {
			guest(mux)
		}
	})
}

// hostilePort is the same without yamux in the guest.
func hostilePort(t *testing.T, guest func(r io.Reader, port net.Conn)) *Session {
	t.Helper()
	host, end := net.Pipe()
	t.Cleanup(func() { end.Close() })
	go func() {
		r := bufio.NewReader(end)
		if err := answer(r, end); err != nil {
			return
		}
		guest(r, end)
	}()
	return session(t, host, false)
}

// TestNothingAccepted shows that a guest which accepts no stream keeps nobody longer than they want to wait.
func TestNothingAccepted(t *testing.T) {
	s := hostile(t, func(*yamux.Session) {})
	for range config().AcceptBacklog {
		if _, err := s.Open(limit(t), testPort); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 { // the first of them stays in yamux, and keeps the others before it
		ctx, cancel := context.WithCancelCause(t.Context())
		late := errors.New("too late")
		opened := make(chan error, 1)
		go func() {
			_, err := s.Open(ctx, testPort)
			opened <- err
		}()
		cancel(late)
		if err := <-opened; !errors.Is(err, late) {
			t.Errorf("open: %v", err)
		}
	}
}

// TestNothingEnded shows that a guest can't have the host keep ever more streams that it has closed.
func TestNothingEnded(t *testing.T) {
	s := hostile(t, func(mux *yamux.Session) {
		for {
			if _, err := mux.AcceptStream(); err != nil {
				return
			}
		}
	})
	for range closingMax {
		c, err := s.Open(limit(t), testPort)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	select {
	case <-s.Done():
		t.Fatal("the session has ended before the limit")
	default:
	}
	if c, err := s.Open(limit(t), testPort); err == nil {
		c.Close()
	}
	select {
	case <-s.Done():
	case <-limit(t).Done():
		t.Error("the session goes on")
	}
}

// TestEndedAtOnce opens more streams than may be under way, and ends each before the guest can have accepted
// it.
func TestEndedAtOnce(t *testing.T) {
	s := hostile(t, func(mux *yamux.Session) {
		for {
			c, err := mux.AcceptStream()
			if err != nil {
				return
			}
			c.Write([]byte{1}) // as the agent does, which answers a header
			c.Close()
		}
	})
	for range 2 * config().AcceptBacklog {
		c, err := s.Open(limit(t), testPort)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		for s.closing.Load() > closingMax/2 {
			runtime.Gosched()
		}
	}
}

// TestCloseEndsRead shows that Close ends a Read which waits, while what comes is still taken in.
func TestCloseEndsRead(t *testing.T) {
	accepted := make(chan *yamux.Stream, 1)
	s := hostile(t, func(mux *yamux.Session) {
		if c, err := mux.AcceptStream(); err == nil {
			c.Write([]byte{1})
			accepted <- c
		}
	})
	c, err := s.Open(limit(t), testPort)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := c.Read(make([]byte, 1))
		ended <- err
	}()
	c.Close()
	if err := <-ended; !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, net.ErrClosed) {
		t.Errorf("the read ends with %v", err)
	}
	guest := <-accepted
	if _, err := guest.Write(make([]byte, 4*window)); err != nil {
		t.Errorf("the guest's write: %v", err)
	}
}

// TestGuestBegins: a guest that pings the host, or opens a stream to it, has no session any more.
func TestGuestBegins(t *testing.T) {
	for name, begin := range map[string]func(mux *yamux.Session) error{
		"ping": func(*yamux.Session) error { return nil },
		"stream": func(mux *yamux.Session) error {
			_, err := mux.OpenStream()
			return err
		},
	} {
		answered := make(chan struct{})
		s := hostile(t, func(mux *yamux.Session) {
			if begin(mux) != nil {
				return
			}
			if _, err := mux.Ping(); err == nil {
				close(answered)
			}
		})
		select {
		case <-s.Done():
		case <-answered:
			t.Errorf("%s: the host answers", name)
		case <-limit(t).Done():
			t.Errorf("%s: the session goes on", name)
		}
	}
}

// TestGuestAnswers: what the host begins, a guest may answer.
func TestGuestAnswers(t *testing.T) {
	p := newPort()
	echo(t, p)
	s := session(t, p.connect(t), false)
	if _, err := s.mux.Ping(); err != nil {
		t.Error(err)
	}
	exchange(t, s, 1000)
}

// TestNothingRead shows that streams to a guest which does not read its port any more can be closed, and that
// this ends who waits for them.
func TestNothingRead(t *testing.T) {
	s := hostilePort(t, func(r io.Reader, port net.Conn) {
		io.ReadFull(r, make([]byte, 2*frameHead+4)) // the stream's beginning, and its port
		port.Write([]byte{0, frameData, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 'x'})
	})
	c, err := s.Open(limit(t), testPort)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	ended, closed := make(chan struct{}), make(chan struct{})
	go c.Write(make([]byte, 1))
	go func() {
		c.Read(make([]byte, 1))
		close(ended)
	}()
	go func() {
		c.Close()
		close(closed)
	}()
	for what, done := range map[string]chan struct{}{"the reader waits": ended, "Close waits": closed} {
		select {
		case <-done:
		case <-limit(t).Done():
			t.Error(what)
		}
	}
}
