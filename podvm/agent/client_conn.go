package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/ttrpc"

	"github.com/caisson-vm/caisson/internal/framing"
)

// The header of a message of ttrpc's has the length of what follows, the number of its stream (4 bytes each,
// big endian), a type and flags (1 byte each). Source: PROTOCOL.md of ttrpc.
const (
	messageHead  = 10
	typeResponse = 2
	typeData     = 3
)

// Limits of a message from the guest, in bytes. ttrpc takes 4 MiB; but what is nothing but empty
// messages takes some 60 times as much memory to decode: 250 MiB, and of the longest answer 16 MiB.
const (
	// answerMax bounds the answer to a call. The longest is that to Stats: with all figures at their largest
	// some 440 bytes for each container, 130 for each emptyDir, 60 for each card.
	answerMax = 256 << 10
	// stateMax bounds what Watch brings: what a container wrote into files, and some 50 bytes for each of them.
	stateMax = WrittenAll + WrittenFiles*64
)

// writeLimit is how long the guest may take to read what is written at once: a request, of 4 MiB at most.
const writeLimit = 30 * time.Second

// lateMax is how many calls that were given up may wait to be written, before the guest is taken for one that
// does not read.
const lateMax = 64

// rpcConn is a stream of RPCs to a guest that may do as it likes: not read what it is asked, and say what it
// was not.
type rpcConn struct {
	net.Conn
	in     *framing.Reader
	closed chan struct{}
	close  func()
}

// newRPCConn returns a stream that ends at a message which admit refuses.
func newRPCConn(conn net.Conn, admit func(kind byte, size uint32) error) *rpcConn {
	c := &rpcConn{Conn: conn, closed: make(chan struct{})}
	c.close = sync.OnceFunc(func() { close(c.closed) })
	c.in = framing.NewReader(conn, messageHead, func(head []byte) (uint32, error) {
		size := binary.BigEndian.Uint32(head)
		return size, admit(head[8], size)
	})
	return c
}

// Read implements net.Conn.
func (c *rpcConn) Read(p []byte) (int, error) { return c.in.Read(p) }

// Write implements net.Conn. The stream ends where the guest does not read, so that who waits to write goes on.
func (c *rpcConn) Write(p []byte) (int, error) {
	c.SetWriteDeadline(time.Now().Add(writeLimit))
	n, err := c.Conn.Write(p)
	if err != nil {
		c.Close()
	}
	return n, err
}

// Close implements net.Conn.
func (c *rpcConn) Close() error {
	c.close()
	return c.Conn.Close()
}

// callConn is the stream for calls.
type callConn struct {
	*rpcConn
	asked atomic.Int64 // calls
	late  atomic.Int64 // those that were given up and wait to be written
}

func newCallConn(conn net.Conn) *callConn {
	c, answers := &callConn{}, int64(0)
	c.rpcConn = newRPCConn(conn, func(_ byte, size uint32) error {
		if answers++; answers > c.asked.Load() {
			return errors.New("the guest answers what it was not asked")
		}
		return tooLong(size, answerMax)
	})
	return c
}

func tooLong(size, most uint32) error {
	if size > most {
		return fmt.Errorf("the guest sends a message of %d bytes, which is over the limit of %d", size, most)
	}
	return nil
}

// call makes a call and waits for it no longer than ctx, at which ttrpc does not look before the call is written.
func (c *callConn) call(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, do ttrpc.Invoker) error {
	c.asked.Add(1)
	var own ttrpc.Response // who asked may have left by then, with theirs
	done, left := make(chan error), make(chan struct{})
	defer close(left)
	go func() {
		err := do(ctx, req, &own)
		select {
		case done <- err:
		case <-left:
			c.late.Add(-1)
		}
	}()
	select {
	case err := <-done:
		resp.Status, resp.Payload = own.Status, own.Payload
		return err
	case <-ctx.Done():
		if c.late.Add(1) > lateMax {
			c.Close()
		}
		return ctx.Err()
	}
}

// watchConn is the stream of a Watch. It reads on when all that it has read was taken: ttrpc keeps 64 messages
// for who takes them, however long they are.
type watchConn struct {
	*rpcConn
	taken atomic.Int64
	more  chan struct{} // has a value when something was taken
}

func newWatchConn(conn net.Conn) *watchConn {
	c := newRPCConn(conn, func(kind byte, size uint32) error {
		if kind == typeData {
			return tooLong(size, stateMax)
		}
		return tooLong(size, answerMax) // the end of the watch
	})
	return &watchConn{rpcConn: c, more: make(chan struct{}, 1)}
}

// Read implements net.Conn.
func (c *watchConn) Read(p []byte) (int, error) {
	for c.in.Whole() > c.taken.Load() {
		select {
		case <-c.more:
		case <-c.closed:
			return 0, net.ErrClosed
		}
	}
	return c.rpcConn.Read(p)
}

// take tells that a message was taken.
func (c *watchConn) take() {
	c.taken.Add(1)
	select {
	case c.more <- struct{}{}:
	default:
	}
}
