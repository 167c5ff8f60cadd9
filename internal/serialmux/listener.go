package serialmux

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"

	"github.com/hashicorp/yamux"
)

// Listener is the guest's end: it accepts streams, session after session.
type Listener struct {
	port    uint32
	open    func() (io.ReadWriteCloser, error)
	streams chan net.Conn
	closed  chan struct{} // by Close
	close   func()
	done    chan struct{}
	err     error // written before done is closed
}

// Listen serves one port number over the serial ports that open returns; it is called again
// whenever the host has gone. Streams to other port numbers are closed.
func Listen(open func() (io.ReadWriteCloser, error), port uint32) *Listener {
	l := &Listener{port: port, open: open, streams: make(chan net.Conn), closed: make(chan struct{}), done: make(chan struct{})}
	l.close = sync.OnceFunc(func() { close(l.closed) })
	go l.run()
	return l
}

func (l *Listener) run() {
	defer close(l.done)
	for {
		if err := l.session(); err != nil {
			l.err = err
			return
		}
		select {
		case <-l.closed:
			l.err = net.ErrClosed
			return
		default:
		}
	}
}

// session serves one host. Its error is that of opening the port: nothing more can come.
func (l *Listener) session() error {
	rw, err := l.open()
	if err != nil {
		return err
	}
	defer rw.Close()
	over := make(chan struct{})
	defer close(over)
	go func() {
		select {
		case <-l.closed:
			rw.Close()
		case <-over:
		}
	}()
	r := bufio.NewReader(rw)
	if err := answer(r, rw); err != nil {
		return nil
	}
	mux, err := yamux.Server(struct {
		io.Reader
		io.WriteCloser
	}{r, rw}, config())
	if err != nil {
		return err
	}
	defer mux.Close()
	for {
		c, err := mux.AcceptStream()
		if err != nil {
			return nil
		}
		go l.accept(c)
	}
}

// answer writes the preamble, reads until the host has repeated its nonce, and confirms that. It
// starts over when the host asks for it.
func answer(r *bufio.Reader, w io.Writer) error {
	for {
		nonce := make([]byte, nonceSize)
		rand.Read(nonce)
		if _, err := w.Write(message(preamble, nonce)); err != nil {
			return err
		}
		again, err := await(r, nonce)
		if err != nil {
			return err
		}
		if !again {
			_, err = w.Write(message(confirm, nonce))
			return err
		}
	}
}

// await reads to the end of the nonce, or to the end of a disturbance: then again is true.
func await(r *bufio.Reader, nonce []byte) (again bool, err error) {
	seen, run := make([]byte, nonceSize), 0
	for range staleMax {
		b, err := r.ReadByte()
		if err != nil {
			return false, err
		}
		if b == disturbance[0] {
			run++
		} else if run >= disturbRun {
			return true, r.UnreadByte()
		} else {
			run = 0
		}
		if run >= disturbRun && r.Buffered() == 0 {
			return true, nil
		}
		copy(seen, seen[1:])
		seen[nonceSize-1] = b
		if bytes.Equal(seen, nonce) {
			return false, nil
		}
	}
	return false, errors.New("no answer from the host")
}

func message(kind byte, nonce []byte) []byte {
	return append(append([]byte(magic), kind), nonce...)
}

func (l *Listener) accept(c *yamux.Stream) {
	var port [4]byte
	if _, err := io.ReadFull(c, port[:]); err != nil || binary.BigEndian.Uint32(port[:]) != l.port {
		(&stream{Stream: c}).Close()
		return
	}
	select {
	case l.streams <- &stream{Stream: c}:
	case <-l.done:
		(&stream{Stream: c}).Close()
	}
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.streams:
		return c, nil
	case <-l.done:
		return nil, l.err
	}
}

// Close implements net.Listener.
func (l *Listener) Close() error {
	l.close()
	return nil
}

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return addr{} }

type addr struct{}

func (addr) Network() string { return "serial" }
func (addr) String() string  { return "serial" }
