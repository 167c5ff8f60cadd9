// Package serialmux carries many byte streams over one serial port between a host and its guest.
//
// The guest writes a preamble, a magic word and 16 random bytes; on a virtio-serial port that write
// waits in the kernel until a host has connected. The host looks for the preamble in whatever is
// still in the port and answers with the 16 bytes; the guest drops what it reads until they come,
// and confirms. From there on both speak yamux, the guest as its server. Each stream begins with the number of
// the port it is for (4 bytes, big endian). When the host goes the guest starts over.
package serialmux

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/caisson-vm/caisson/internal/framing"
)

const (
	// magic is followed by one of two bytes and the nonce.
	magic     = "CSN"
	preamble  = '1'
	confirm   = '2'
	nonceSize = 16
	// staleMax is how much either end skips before what it waits for, in bytes.
	staleMax = 4 << 20
	// window is how much may be under way on one stream, in bytes.
	window = 512 << 10
)

// config of both ends. Keepalive is off: a paused guest must not lose its streams, and a dead VM
// is seen by other means.
func config() *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false
	c.MaxStreamWindowSize = window
	c.StreamOpenTimeout = 0
	c.StreamCloseTimeout = 0
	c.AcceptBacklog = 4096
	c.ConnectionWriteTimeout = 5 * time.Minute
	c.LogOutput = io.Discard
	return c
}

// Session is the host's end.
type Session struct {
	mux *yamux.Session
	// opening holds a token: yamux lets no more than some streams be opened that the guest has not
	// accepted, and who comes then waits in it.
	opening chan struct{}
	closing atomic.Int32 // streams that the guest has not ended
}

// closingMax is how many streams a guest may leave open that the host has closed, before the host takes
// it for one that does so on purpose, and ends the session.
const closingMax = 512

// Dial begins a session over a connection to the port. It waits for the guest, which may still be
// booting, until ctx ends, and closes the connection when it fails. With again set, the guest may
// not have noticed that a former host went: it is made to.
func Dial(ctx context.Context, conn net.Conn, again bool) (*Session, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	r := bufio.NewReader(conn)
	quiet := func() {}
	if again {
		quiet = disturb(conn)
	}
	err := greet(r, conn, quiet)
	quiet()
	if !stop() {
		err = errors.Join(context.Cause(ctx), err)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("serial channel: %w", err)
	}
	mux, err := yamux.Client(buffered{framing.NewReader(r, frameHead, answers), conn}, config())
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("serial channel: %w", err)
	}
	return &Session{mux: mux, opening: make(chan struct{}, 1)}, nil
}

// greet answers the guest's preambles until the guest confirms an answer. There may be stale ones,
// of a guest that started over, and other bytes of former sessions before and between them.
func greet(r *bufio.Reader, w io.Writer, quiet func()) error {
	var answered [nonceSize]byte
	for skipped := 0; skipped < staleMax; {
		n, err := skipTo(r, magic)
		if err != nil {
			return err
		}
		skipped += n
		var nonce [nonceSize]byte
		kind, err := r.ReadByte()
		if err != nil {
			return err
		}
		if kind != preamble && kind != confirm {
			continue
		}
		if _, err := io.ReadFull(r, nonce[:]); err != nil {
			return err
		}
		switch {
		case kind == confirm && nonce == answered:
			return nil
		case kind == preamble:
			quiet()
			answered = nonce
			if _, err := w.Write(nonce[:]); err != nil {
				return err
			}
		}
	}
	return errors.New("no preamble from the guest")
}

// disturbance makes the guest start over, whatever it is in: no version of yamux begins a header so,
// and where a nonce is awaited a run of it is taken as a request. A session that is in the middle of
// a frame swallows a part of it, at most a window.
var disturbance = bytes.Repeat([]byte{0xff}, 4<<10)

const (
	disturbEvery = 200 * time.Millisecond
	// disturbRun is how many bytes of it are no accident.
	disturbRun = 64
)

// disturb writes it, again and again up to a window's size, until the function that it returns is
// called, which waits for the last write.
func disturb(conn net.Conn) (quiet func()) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for written, chunk := 0, len(disturbance); written < 2*window; written, chunk = written+chunk, window/8 {
			if _, err := conn.Write(bytes.Repeat(disturbance, chunk/len(disturbance))); err != nil {
				return
			}
			select {
			case <-stop:
				return
			case <-time.After(disturbEvery):
			}
		}
	}()
	return sync.OnceFunc(func() {
		close(stop)
		<-done
	})
}

// Reset makes the guest end a session that is over for the host, waits until it has, and closes the
// connection: the guest then waits for the next host.
func Reset(ctx context.Context, conn net.Conn) error {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	quiet := disturb(conn)
	_, err := skipTo(bufio.NewReader(conn), magic+string(preamble))
	conn.Close()
	quiet()
	if err != nil {
		return fmt.Errorf("reset the serial channel: %w", errors.Join(context.Cause(ctx), err))
	}
	return nil
}

// skipTo reads up to the end of the next occurrence of word and returns how many bytes that took.
func skipTo(r io.ByteReader, word string) (int, error) {
	for n, seen := 0, make([]byte, len(word)); n < staleMax; n++ {
		if n > 0 && string(seen) == word {
			return n, nil
		}
		b, err := r.ReadByte()
		if err != nil {
			return n, err
		}
		copy(seen, seen[1:])
		seen[len(seen)-1] = b
	}
	return staleMax, errors.New("no preamble from the guest")
}

// A frame of yamux has a version, a type (1 byte each), flags (2), the number of its stream, and a length (4
// each, all big endian), which is that of what follows in a frame of data only.
// Source: const.go of yamux.
const (
	frameHead = 12
	frameData = 0
	flagBegin = 1 // a stream, or a ping
)

// answers refuses what a guest begins, which one that is honest leaves to the host: for each ping yamux has a
// goroutine that answers it once the guest reads, and it keeps the streams that nobody accepts, with what
// came on them.
func answers(head []byte) (body uint32, err error) {
	if binary.BigEndian.Uint16(head[2:])&flagBegin != 0 {
		return 0, errors.New("the guest begins streams or pings")
	}
	if head[1] != frameData {
		return 0, nil
	}
	return binary.BigEndian.Uint32(head[8:]), nil
}

// buffered is a connection whose first bytes were read ahead.
type buffered struct {
	r io.Reader
	net.Conn
}

func (b buffered) Read(p []byte) (int, error) { return b.r.Read(p) }

// Open opens a stream to a port in the guest. It waits, until ctx ends, for a guest that has not accepted
// those before.
func (s *Session) Open(ctx context.Context, port uint32) (net.Conn, error) {
	select {
	case s.opening <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("serial channel: the guest accepts no stream: %w", context.Cause(ctx))
	}
	type result struct {
		conn net.Conn
		err  error
	}
	results := make(chan result, 1)
	go func() {
		c, err := s.open(port)
		<-s.opening
		results <- result{c, err}
	}()
	select {
	case r := <-results:
		if r.err != nil {
			return nil, fmt.Errorf("serial channel: open stream: %w", r.err)
		}
		return r.conn, nil
	case <-ctx.Done():
		go func() {
			if r := <-results; r.err == nil {
				r.conn.Close()
			}
		}()
		return nil, fmt.Errorf("serial channel: the guest accepts no stream: %w", context.Cause(ctx))
	}
}

func (s *Session) open(port uint32) (net.Conn, error) {
	c, err := s.mux.OpenStream()
	if err != nil {
		return nil, err
	}
	if _, err := c.Write(binary.BigEndian.AppendUint32(nil, port)); err != nil {
		c.Close()
		return nil, err
	}
	return &stream{Stream: c, session: s}, nil
}

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.mux.CloseChan() }

// Close ends the session and its connection.
func (s *Session) Close() error { return s.mux.Close() }

// stream is one stream. yamux's own Close only ends the writing; here that is CloseWrite, and
// Close ends the reading as well.
type stream struct {
	*yamux.Stream
	session *Session // nil in the guest
	reading sync.Mutex
	closed  atomic.Bool
	heard   atomic.Bool // the peer has sent something
}

// Read implements net.Conn.
func (s *stream) Read(b []byte) (int, error) {
	s.reading.Lock()
	defer s.reading.Unlock()
	if s.closed.Load() {
		return 0, net.ErrClosed
	}
	n, err := s.Stream.Read(b)
	if n > 0 || err == io.EOF {
		s.heard.Store(true)
	}
	return n, err
}

// CloseWrite ends the writing: the peer reads an end of file.
func (s *stream) CloseWrite() error { return s.Stream.Close() }

// Close ends both directions, and waits for neither: a peer that reads nothing is told later. What it still
// sends is taken in and dropped, so that it neither waits for a window that nobody opens nor fills a memory
// that nobody empties.
func (s *stream) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	s.SetDeadline(time.Now()) // of who reads, or waits for a window to write
	if s.session != nil && s.session.closing.Add(1) > closingMax {
		s.session.Close()
	}
	go s.drain()
	return nil
}

// accepted tells whether the peer is known to have accepted the stream: it has opened it, or answered.
func (s *stream) accepted() bool { return s.session == nil || s.heard.Load() }

// hearLimit is how long a stream that is closed waits for its peer to accept it.
const hearLimit = 30 * time.Second

// drain reads until the peer has ended the stream, too.
func (s *stream) drain() {
	if s.session != nil {
		defer s.session.closing.Add(-1)
	}
	accepted := s.accepted()
	if accepted {
		s.Stream.Close()
	}
	s.reading.Lock() // a Read that waited has returned, and none waits from now on
	s.SetReadDeadline(time.Now().Add(hearLimit))
	s.reading.Unlock()
	if !accepted {
		// yamux does not accept a stream that was ended before, and would count it as one to be accepted
		// for ever.
		s.Stream.Read(make([]byte, 1))
		s.Stream.Close()
	}
	s.SetReadDeadline(time.Time{})
	io.Copy(io.Discard, s.Stream)
}
