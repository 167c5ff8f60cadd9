package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
)

const (
	// keepMax bounds the output that is kept until the host acknowledged it, in bytes of frames.
	keepMax = 1 << 20
	// sendMax is how much of it is sent at once.
	sendMax = 64 << 10
	// frameHead and recordHead are what stands before a record's line: a frame's type and length,
	// and the record's offset, time and flags.
	frameHead  = 1 + 4
	recordHead = 8 + 8 + 1
)

// errEnded says that a container's output is no longer wanted.
var errEnded = errors.New("the output was closed")

// output keeps a container's output, as the frames that carry its records, until the host has
// acknowledged them. When it is full, writers wait: so the container's own write does.
type output struct {
	mu sync.Mutex
	// changed is closed, and replaced, at every change.
	changed chan struct{}
	// frames are those not acknowledged; base counts the bytes of all that were.
	frames []byte
	base   uint64
	// store is the array that frames are in.
	store []byte
	// first is the offset of the first record kept, next that of the record to come.
	first, next uint64
	// ended: no record comes any more. closed: none is wanted any more.
	ended, closed bool
	// readers counts the streams there were; only the latest goes on.
	readers int
}

func newOutput() *output { return &output{changed: make(chan struct{})} }

// notifyLocked wakes all who wait. The caller holds mu.
func (o *output) notifyLocked() {
	close(o.changed)
	o.changed = make(chan struct{})
}

// add appends the lines as records. It waits while there is no room.
func (o *output) add(records []agent.Record) error {
	for len(records) > 0 {
		n, wait := o.fill(records)
		if records = records[n:]; len(records) == 0 {
			return nil
		}
		if wait == nil {
			return errEnded
		}
		<-wait
	}
	return nil
}

// fill appends as many records as there is room for, and returns what to wait for if that was not
// all; nil when the output was closed.
func (o *output) fill(records []agent.Record) (int, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return 0, nil
	}
	o.growLocked(records)
	done := 0
	for _, r := range records {
		size := frameHead + recordHead + len(r.Line)
		if len(o.frames)+size > keepMax {
			break
		}
		r.Offset = o.next
		o.frames = append(o.frames, byte(agent.FrameOutput))
		o.frames = binary.BigEndian.AppendUint32(o.frames, uint32(size-frameHead))
		o.frames = agent.AppendRecord(o.frames, r)
		o.next += agent.RecordSize(len(r.Line))
		done++
	}
	if done > 0 {
		o.notifyLocked()
	}
	return done, o.changed
}

// growLocked makes room for the records, as far as they may be kept. The caller holds mu. What was
// acknowledged leaves its place in front; it is used again once it is at least what is to be moved.
func (o *output) growLocked(records []agent.Record) {
	need := len(o.frames)
	for _, r := range records {
		need += frameHead + recordHead + len(r.Line)
	}
	need = min(need, keepMax)
	if need <= cap(o.frames) {
		return
	}
	if len(o.store) < 2*need {
		o.store = make([]byte, 2*need)
	}
	o.frames = o.store[:copy(o.store, o.frames)]
}

// end says that there is no more to come.
func (o *output) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended = true
	o.notifyLocked()
}

// close drops everything; whoever adds or reads stops.
func (o *output) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed, o.frames, o.store = true, nil, nil
	o.notifyLocked()
}

// frameAt reads the head of the frame at an index: its record's offset and the frame's size.
func (o *output) frameAt(i int) (offset uint64, size int) {
	b := o.frames[i:]
	return binary.BigEndian.Uint64(b[frameHead:]), frameHead + int(binary.BigEndian.Uint32(b[1:]))
}

// seekLocked finds the frame of the record at an offset. Frames are found one after the other.
func (o *output) seekLocked(offset uint64) (int, error) {
	if offset < o.first || offset > o.next {
		return 0, fmt.Errorf("output is kept from offset %d to %d, not at %d: %w", o.first, o.next, offset, errdefs.ErrInvalidArgument)
	}
	i := 0
	for i < len(o.frames) {
		at, size := o.frameAt(i)
		if at == offset {
			return i, nil
		}
		if at > offset {
			return 0, fmt.Errorf("output offset %d is within a record: %w", offset, errdefs.ErrInvalidArgument)
		}
		i += size
	}
	return i, nil
}

// ack frees what lies before the offset.
func (o *output) ack(offset uint64) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if offset <= o.first || o.closed {
		return nil
	}
	i, err := o.seekLocked(offset)
	if err != nil {
		return err
	}
	o.base += uint64(i)
	o.first = offset
	if i == len(o.frames) && len(o.store) > sendMax {
		o.frames, o.store = nil, nil // an idle container keeps no memory
	} else {
		o.frames = o.frames[i:]
	}
	o.notifyLocked()
	return nil
}

// open begins to read at an offset; it ends the reader before.
func (o *output) open(offset uint64) (*outputReader, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	i, err := o.seekLocked(offset)
	if err != nil {
		return nil, err
	}
	o.readers++
	o.notifyLocked()
	return &outputReader{o: o, turn: o.readers, at: o.base + uint64(i)}, nil
}

type outputReader struct {
	o    *output
	turn int
	at   uint64
}

// next appends whole frames to b, at least one. io.EOF: that was all.
func (r *outputReader) next(ctx context.Context, b []byte) ([]byte, error) {
	for {
		b, wait, err := r.take(b)
		if err != nil || len(b) > 0 {
			return b, err
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (r *outputReader) take(b []byte) ([]byte, <-chan struct{}, error) {
	o := r.o
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed || r.turn != o.readers || r.at < o.base {
		return nil, nil, net.ErrClosed
	}
	i := int(r.at - o.base)
	if i == len(o.frames) && o.ended {
		return nil, nil, io.EOF
	}
	end := i
	for end < len(o.frames) {
		_, size := o.frameAt(end)
		if end > i && end+size-i > sendMax {
			break
		}
		end += size
	}
	b = append(b, o.frames[i:end]...)
	r.at += uint64(end - i)
	return b, o.changed, nil
}

// splitter cuts one stream of a container into lines.
type splitter struct {
	stderr bool
	// part is the begin of a line whose end has not come.
	part []byte
}

// split returns the records that are complete with these bytes. They are valid until the next call.
func (s *splitter) split(p []byte, records []agent.Record) []agent.Record {
	now := time.Now().UnixNano()
	emit := func(line []byte, partial bool) {
		records = append(records, agent.Record{Time: now, Stderr: s.stderr, Partial: partial, Line: line})
	}
	for len(p) > 0 {
		room := agent.LineMax - len(s.part)
		i := bytes.IndexByte(p, '\n')
		switch {
		case i >= 0 && i <= room:
			emit(s.join(p[:i]), false)
			p = p[i+1:]
		case len(p) > room:
			emit(s.join(p[:room]), true)
			p = p[room:]
		default:
			s.part = append(s.part, p...)
			p = nil
		}
	}
	return records
}

// join returns what was kept of the line with its rest. The result no longer belongs to s.
func (s *splitter) join(rest []byte) []byte {
	if len(s.part) == 0 {
		return rest
	}
	line := append(s.part, rest...)
	s.part = nil
	return line
}

// rest is the record of a line that never ended.
func (s *splitter) rest() []agent.Record {
	if len(s.part) == 0 {
		return nil
	}
	return []agent.Record{{Time: time.Now().UnixNano(), Stderr: s.stderr, Partial: true, Line: s.join(nil)}}
}

// output serves a stream of a container's output.
func (a *Agent) output(c net.Conn, h agent.Header) error {
	k, err := a.container(h.Container)
	if err != nil {
		return refuse(c, err)
	}
	r, err := k.out.open(h.Offset)
	if err != nil {
		return refuse(c, err)
	}
	if err := agent.WriteMessage(c, agent.Reply{}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	// Ends with the stream, which may be taken over while a write to it hangs.
	go func() {
		defer cancel()
		acknowledge(c, k.out)
	}()
	var buf []byte
	for {
		buf, err = r.next(ctx, buf[:0])
		if errors.Is(err, io.EOF) {
			// Acknowledgements may still come.
			if err := agent.NewFrameWriter(c).End(agent.FrameOutput); err != nil {
				return err
			}
			<-ctx.Done()
			return nil
		} else if err != nil {
			return err
		}
		if _, err := c.Write(buf); err != nil {
			return err
		}
	}
}

// acknowledge frees what the host has safe, until the stream ends or says nonsense.
func acknowledge(c net.Conn, o *output) {
	var b [8]byte
	for {
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return
		}
		if o.ack(binary.BigEndian.Uint64(b[:])) != nil {
			return
		}
	}
}
