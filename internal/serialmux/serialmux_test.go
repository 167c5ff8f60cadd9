package serialmux

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// port is a serial port whose host end can be connected anew; the guest's writes wait for that.
type port struct {
	hosts chan net.Conn
}

func newPort() *port { return &port{make(chan net.Conn)} }

// open is the guest's: like the device, it waits for a host no later than in the first write.
func (p *port) open() (io.ReadWriteCloser, error) {
	c, ok := <-p.hosts
	if !ok {
		return nil, io.EOF
	}
	return c, nil
}

// connect is the host's.
func (p *port) connect(t *testing.T) net.Conn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	host, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	guest, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	p.hosts <- guest
	return host
}

const testPort = 7

// echo serves what it gets back, to the end of file.
func echo(t *testing.T, p *port) *Listener {
	l := Listen(p.open, testPort)
	t.Cleanup(func() { l.Close(); close(p.hosts) })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(c, c)
				c.Close()
			}()
		}
	}()
	return l
}

func limit(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func session(t *testing.T, conn net.Conn, again bool) *Session {
	t.Helper()
	s, err := Dial(limit(t), conn, again)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// exchange sends n random bytes, ends the writing, and wants them back.
func exchange(t *testing.T, s *Session, n int) {
	t.Helper()
	c, err := s.Open(t.Context(), testPort)
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	data := make([]byte, n)
	rand.Read(data)
	go func() {
		c.Write(data)
		c.(interface{ CloseWrite() error }).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes back of %d, %v", len(got), n, err)
	}
}

func TestManyStreamsWithHalfClose(t *testing.T) {
	p := newPort()
	echo(t, p)
	s := session(t, p.connect(t), false)
	var group sync.WaitGroup
	for i := range 20 {
		group.Go(func() { exchange(t, s, i*100_000) })
	}
	group.Wait()
}

func TestOtherPortsAreClosed(t *testing.T) {
	p := newPort()
	echo(t, p)
	s := session(t, p.connect(t), false)
	c, err := s.Open(t.Context(), testPort+1)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
		t.Fatalf("read %q, %v", b, err)
	}
	exchange(t, s, 10)
}

func TestNextHost(t *testing.T) {
	p := newPort()
	echo(t, p)
	for range 3 {
		s := session(t, p.connect(t), true)
		exchange(t, s, 1000)
		s.Close()
	}
}

// The host goes and its successor comes on the same line before the guest noticed: the guest is still
// in the old session, in the middle of a frame.
func TestGuestThatDidNotNotice(t *testing.T) {
	p := newPort()
	echo(t, p)
	conn := p.connect(t)
	s := session(t, conn, false)
	exchange(t, s, 1000)
	// A data frame that announces 100,000 bytes on a new stream, and breaks off.
	conn.Write([]byte{0, 0, 0, 1, 0, 0, 0, 99, 0, 1, 0x86, 0xa0, 1, 2, 3})
	quiet := disturb(conn)
	defer quiet()
	next := p.connect(t) // is taken only when the guest has given up the session
	exchange(t, session(t, next, true), 1000)
}

// A host that asks anew where the guest awaits a nonce is answered on the same line.
func TestGuestThatAwaitsANonce(t *testing.T) {
	p := newPort()
	echo(t, p)
	conn := p.connect(t)
	if _, err := skipTo(bufio.NewReader(conn), magic+string(preamble)); err != nil {
		t.Fatal(err)
	}
	exchange(t, session(t, conn, true), 1000)
}

func TestReset(t *testing.T) {
	p := newPort()
	echo(t, p)
	for range 3 {
		s := session(t, p.connect(t), false)
		exchange(t, s, 10)
		s.Close()
		if err := Reset(limit(t), p.connect(t)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStaleBytesAreSkipped(t *testing.T) {
	host, guest := net.Pipe()
	defer guest.Close()
	go func() {
		guest.Write([]byte("boot messages CSN CSN3"))
		guest.Write(message(preamble, bytes.Repeat([]byte{1}, nonceSize)))
		io.ReadFull(guest, make([]byte, nonceSize))
		guest.Write([]byte("frames of a former session"))
		guest.Write(message(confirm, bytes.Repeat([]byte{2}, nonceSize)))
		if err := answer(bufio.NewReader(guest), guest); err != nil {
			t.Error(err)
		}
	}()
	s, err := Dial(limit(t), host, false)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

func TestDialEndsWithItsContext(t *testing.T) {
	host, guest := net.Pipe()
	defer guest.Close()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Dial(ctx, host, false); err == nil {
		t.Fatal("a session with nobody")
	}
}

func FuzzGreet(f *testing.F) {
	f.Add([]byte("CSN10123456789abcdef"))
	f.Add([]byte("CSNCSN1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		host, guest := net.Pipe()
		go func() {
			guest.Write(b)
			guest.Close()
		}()
		go io.Copy(io.Discard, guest)
		if s, err := Dial(context.Background(), host, false); err == nil {
			s.Close()
		}
	})
}
