package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/containerd/errdefs"
)

// MessageMax is the longest message of a Link, in bytes: a FUSE request or reply with 256 KiB of data.
const MessageMax = 256<<10 + 8<<10

const (
	// linkKept bounds what an end has sent and the other has not acknowledged, in bytes: whoever sends
	// more waits.
	linkKept = 4 << 20
	// An end acknowledges at the latest when it owes as many messages, or bytes.
	oweMessages, oweBytes = 32, 512 << 10
	// linkHead is what stands before a message: how many messages its sender has received, and its
	// length; no message where that is 0.
	linkHead = 8 + 4
)

// Link carries messages both ways over streams that may break: each arrives once, in order, if there
// is another stream some day. What was sent is kept until the other end acknowledges it, and sent again
// on the next stream, which begins with each end knowing how many messages the other has received.
type Link struct {
	mu sync.Mutex
	// changed is signalled at every change.
	changed sync.Cond
	// kept are the messages that are not acknowledged; the first has the number base.
	kept  [][]byte
	base  uint64
	bytes int
	// next is the number of the message that the stream takes next.
	next uint64
	// received counts the messages that came, acked those that the other end knows of.
	received, acked uint64
	owed            int // bytes since
	// stream is the one in use, and stop ends it; a new one takes its place.
	stream net.Conn
	stop   context.CancelFunc
	turn   chan struct{} // held by the stream in use
	closed bool
}

// errLinkClosed is what Send and Run return after Close.
var errLinkClosed = fmt.Errorf("the link is closed: %w", net.ErrClosed)

// errBroke says that a stream ended, in whatever way: there may be another one.
var errBroke = errors.New("the stream broke")

// NewLink returns a link over which nothing was sent.
func NewLink() *Link {
	l := &Link{turn: make(chan struct{}, 1)}
	l.changed.L = &l.mu
	return l
}

// Send sends a message of at most MessageMax bytes, which it takes over. It waits while much is on its
// way. After Close it fails.
func (l *Link) Send(message []byte) error {
	if len(message) == 0 || len(message) > MessageMax {
		return fmt.Errorf("message of %d bytes: want 1 to %d", len(message), MessageMax)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.bytes >= linkKept && !l.closed {
		l.changed.Wait()
	}
	if l.closed {
		return errLinkClosed
	}
	l.kept, l.bytes = append(l.kept, message), l.bytes+len(message)
	l.changed.Broadcast()
	return nil
}

// Received is how many messages have come. A new stream's other end is told.
func (l *Link) Received() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.received
}

// Connected tells whether a stream is in use.
func (l *Link) Connected() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stream != nil
}

// Close ends the link for good, and the stream in use.
func (l *Link) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.stopLocked()
	l.changed.Broadcast()
}

// stopLocked ends the stream in use. The caller holds mu.
func (l *Link) stopLocked() {
	if l.stream != nil {
		l.stop()
		l.stream.Close()
	}
}

// Take ends the stream in use, and returns when it delivers nothing more: from then on Received does not
// change until Run is called, which the caller does next, or Leave.
func (l *Link) Take() {
	l.mu.Lock()
	l.stopLocked()
	l.mu.Unlock()
	l.turn <- struct{}{}
}

// Leave gives the turn back that Take took.
func (l *Link) Leave() { <-l.turn }

// Deliver takes a message that came, which it may keep. Its context ends with the stream: a message for
// which it returns an error has not been received, and comes again on the next stream.
type Deliver func(ctx context.Context, message []byte) error

// Run carries messages over the stream until it breaks, and closes it; the caller has called Take. The
// other end has received so many messages of this one. Messages are delivered one after another; who
// delivers may wait for Send. The error is deliver's, or says what the other end did wrong
// (ErrInvalidArgument).
func (l *Link) Run(stream net.Conn, received uint64, deliver Deliver) error {
	defer l.Leave()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	if err := l.begin(stream, stop, received); err != nil {
		return errors.Join(err, stream.Close())
	}
	var others sync.WaitGroup
	others.Go(func() {
		if l.write(stream) != nil {
			stop()
			stream.Close() // the reader tells why
		}
	})
	q := newLinkQueue()
	var delivered error
	others.Go(func() {
		if delivered = l.deliver(ctx, q, deliver); delivered != nil {
			stop()
			stream.Close()
		}
	})
	err := l.read(stream, q)
	stop()
	l.end(stream)
	q.close()
	others.Wait()
	if delivered != nil && !errors.Is(delivered, context.Canceled) {
		return delivered
	}
	if errors.Is(err, errBroke) || errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (l *Link) begin(stream net.Conn, stop context.CancelFunc, received uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errLinkClosed
	}
	if err := l.acknowledgeLocked(received, l.base+uint64(len(l.kept))); err != nil {
		return err
	}
	l.stream, l.stop, l.next, l.acked, l.owed = stream, stop, l.base, l.received, 0
	return nil
}

func (l *Link) end(stream net.Conn) {
	stream.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stream = nil
	l.changed.Broadcast()
}

// acknowledgeLocked lets go of what the other end has received, of the messages before most. The caller
// holds mu.
func (l *Link) acknowledgeLocked(received, most uint64) error {
	if received < l.base || received > most {
		return fmt.Errorf("the other end says that it has received %d messages, of %d to %d: %w", received, l.base, most, errdefs.ErrInvalidArgument)
	}
	n := int(received - l.base)
	for i := range n {
		l.bytes -= len(l.kept[i])
		l.kept[i] = nil
	}
	if l.kept, l.base = l.kept[n:], received; len(l.kept) == 0 {
		l.kept = nil
	}
	l.changed.Broadcast()
	return nil
}

// due waits until there is something to write: a message, or else only an acknowledgement.
func (l *Link) due(stream net.Conn) (head [linkHead]byte, message []byte, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		if l.closed || l.stream != stream {
			return head, nil, false
		}
		waits := l.next < l.base+uint64(len(l.kept))
		if waits || l.received-l.acked >= oweMessages || l.owed >= oweBytes {
			if waits {
				message = l.kept[l.next-l.base]
				l.next++
			}
			l.acked, l.owed = l.received, 0
			binary.BigEndian.PutUint64(head[:], l.received)
			binary.BigEndian.PutUint32(head[8:], uint32(len(message)))
			return head, message, true
		}
		l.changed.Wait()
	}
}

func (l *Link) write(stream net.Conn) error {
	for {
		head, message, ok := l.due(stream)
		if !ok {
			return nil
		}
		buffers := net.Buffers{head[:], message}
		if _, err := buffers.WriteTo(stream); err != nil {
			return err
		}
	}
}

// read takes in what comes. It waits for nothing else: acknowledgements come this way, and whoever delivers
// may be waiting for them.
func (l *Link) read(stream net.Conn, q *linkQueue) error {
	for {
		var head [linkHead]byte
		if _, err := io.ReadFull(stream, head[:]); err != nil {
			return errBroke
		}
		size := binary.BigEndian.Uint32(head[8:])
		if size > MessageMax {
			return fmt.Errorf("message of %d bytes is over the limit of %d: %w", size, MessageMax, errdefs.ErrInvalidArgument)
		}
		message := make([]byte, size)
		if _, err := io.ReadFull(stream, message); err != nil {
			return errBroke
		}
		if err := l.acknowledged(binary.BigEndian.Uint64(head[:])); err != nil {
			return err
		}
		if size == 0 {
			continue
		}
		if err := q.put(message); err != nil {
			return err
		}
	}
}

// deliver hands on what was read, one after another, until the stream ends.
func (l *Link) deliver(ctx context.Context, q *linkQueue, deliver Deliver) error {
	for {
		message := q.take()
		if message == nil {
			return nil
		}
		if err := deliver(ctx, message); err != nil {
			return err
		}
		l.count(len(message))
	}
}

func (l *Link) acknowledged(received uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.acknowledgeLocked(received, l.next)
}

// count notes that a message was delivered.
func (l *Link) count(size int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.received, l.owed = l.received+1, l.owed+size
	if l.received-l.acked >= oweMessages || l.owed >= oweBytes {
		l.changed.Broadcast()
	}
}

// linkQueue is what was read and not delivered. An end that keeps the rules has no more on its way than
// what it keeps.
type linkQueue struct {
	mu       sync.Mutex
	changed  sync.Cond
	messages [][]byte
	bytes    int
	closed   bool
}

func newLinkQueue() *linkQueue {
	q := &linkQueue{}
	q.changed.L = &q.mu
	return q
}

func (q *linkQueue) put(message []byte) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.bytes > linkKept+MessageMax {
		return fmt.Errorf("%d bytes came without an acknowledgement, of at most %d: %w", q.bytes, linkKept, errdefs.ErrInvalidArgument)
	}
	q.messages, q.bytes = append(q.messages, message), q.bytes+len(message)
	q.changed.Signal()
	return nil
}

// take waits for a message; nil after close.
func (q *linkQueue) take() []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.messages) == 0 && !q.closed {
		q.changed.Wait()
	}
	if q.closed {
		return nil
	}
	message := q.messages[0]
	q.messages[0] = nil
	q.messages, q.bytes = q.messages[1:], q.bytes-len(message)
	return message
}

func (q *linkQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.changed.Signal()
}
