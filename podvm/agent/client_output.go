package agent

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/containerd/errdefs"
)

// Output is a container's output as records. Next belongs to one goroutine; Ack and Close may be
// called from others.
type Output struct {
	conn net.Conn
	r    *FrameReader
	stop func() bool
	next uint64

	mu    sync.Mutex
	acked uint64
}

// Output returns the container's output from an offset on: 0, or one that follows a record. The
// agent keeps what was not acknowledged, and stops reading from the container when it can keep no
// more. An offset that is acknowledged already is ErrInvalidArgument, and so is one not reached yet. One stream
// at a time: a new one ends the one before. The stream ends with ctx, too.
func (c *Client) Output(ctx context.Context, container string, offset uint64) (*Output, error) {
	conn, err := c.open(ctx, Header{Kind: KindOutput, Container: container, Offset: offset})
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	return &Output{conn: conn, r: NewFrameReader(bufio.NewReaderSize(conn, FrameMax)), stop: stop, next: offset, acked: offset}, nil
}

// Next returns the next record; its Line is valid until the following Next. It returns io.EOF when
// the container has ended and all its output was given, and ErrUnavailable when the stream broke.
func (o *Output) Next() (Record, error) {
	t, body, err := o.r.Read()
	if err == io.EOF { // an empty frame tells the end of the output; this is that of the stream
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return Record{}, fmt.Errorf("the stream of output broke: %w: %w", err, errdefs.ErrUnavailable)
	}
	if t != FrameOutput {
		return Record{}, fmt.Errorf("unexpected frame of type %d among output: %w", t, errdefs.ErrInternal)
	}
	if len(body) == 0 {
		return Record{}, io.EOF
	}
	r, err := ParseRecord(body)
	if err != nil {
		return Record{}, fmt.Errorf("%w: %w", err, errdefs.ErrInternal)
	}
	if r.Offset != o.next {
		return Record{}, fmt.Errorf("output record at %d where %d was due: %w", r.Offset, o.next, errdefs.ErrInternal)
	}
	o.next += RecordSize(len(r.Line))
	return r, nil
}

// Ack tells the agent that everything before the offset is safe and need not be kept.
func (o *Output) Ack(offset uint64) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if offset <= o.acked {
		return nil
	}
	if _, err := o.conn.Write(binary.BigEndian.AppendUint64(nil, offset)); err != nil {
		return fmt.Errorf("acknowledge output: %w: %w", err, errdefs.ErrUnavailable)
	}
	o.acked = offset
	return nil
}

// Close ends the stream. What was not acknowledged is kept.
func (o *Output) Close() error {
	o.stop()
	return o.conn.Close()
}
