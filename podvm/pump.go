package podvm

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// How long a log waits before it tries again: after its stream broke, after the disk was full.
const (
	reconnect = 500 * time.Millisecond
	retryFull = 2 * time.Second
)

// pump moves a container's output to its log until all of it is there (nil), ctx ends, or the VM has
// ended.
func pump(ctx context.Context, client *agent.Client, container string, w *logWriter) error {
	for {
		err := pumpOnce(ctx, client, container, w)
		switch {
		case err == io.EOF, errors.Is(err, errdefs.ErrNotFound): // others have it in them where a stream broke
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, vmm.ErrGone):
			return err
		}
		slog.Debug("stream of output broke", "container", container, "err", err)
		select {
		case <-time.After(reconnect):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func pumpOnce(ctx context.Context, client *agent.Client, container string, w *logWriter) error {
	out, err := client.Output(ctx, container, w.offset())
	if err != nil {
		return err
	}
	defer out.Close()
	q := newQueue()
	defer close(q.done)
	go q.fill(out)
	for {
		batch, end := q.take()
		if len(batch) > 0 {
			ack, err := writeAtLast(ctx, w, batch, container)
			if err != nil {
				return err
			}
			if err := out.Ack(ack); err != nil {
				return err
			}
			continue
		}
		if end != nil {
			return end
		}
		select {
		case <-q.filled:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// writeAtLast writes a batch, and waits for room on a full disk: meanwhile the container's output is
// kept in its guest, and then its writes wait.
func writeAtLast(ctx context.Context, w *logWriter, batch []agent.Record, container string) (uint64, error) {
	for told := false; ; told = true {
		ack, err := w.write(batch)
		if err == nil {
			return ack, nil
		}
		if !told {
			slog.Error("container log can't be written; its output waits", "container", container, "err", err)
		}
		select {
		case <-time.After(retryFull):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// queueMax bounds a queue, in bytes: an agent that does not care for acknowledgements is read no
// further.
const queueMax = 1 << 20

// recordCost is what a record takes in a queue beside its line, in bytes.
const recordCost = 64

// queue is what was received and not yet written.
type queue struct {
	filled chan struct{} // has a value when there is something to take
	taken  chan struct{} // has a value when there is room again
	done   chan struct{} // closed when nobody takes any more

	mu      sync.Mutex
	records []agent.Record
	lines   []byte
	err     error
}

func newQueue() *queue {
	return &queue{filled: make(chan struct{}, 1), taken: make(chan struct{}, 1), done: make(chan struct{})}
}

// fill takes records until the stream ends.
func (q *queue) fill(out *agent.Output) {
	for {
		r, err := out.Next()
		full := q.put(r, err)
		notify(q.filled)
		if err != nil {
			return
		}
		for ; full; full = q.full() {
			select {
			case <-q.taken:
			case <-q.done:
				return
			}
		}
	}
}

func (q *queue) put(r agent.Record, err error) (full bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if err != nil {
		q.err = err
		return false
	}
	// Next's line is valid until the next one. A reallocation leaves earlier records pointing into
	// the old array, which stays as it is.
	q.lines = append(q.lines, r.Line...)
	r.Line = q.lines[len(q.lines)-len(r.Line):]
	q.records = append(q.records, r)
	return q.fullLocked()
}

func (q *queue) full() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.fullLocked()
}

func (q *queue) fullLocked() bool { return len(q.lines)+len(q.records)*recordCost >= queueMax }

// take returns all records that have come, and why no more will.
func (q *queue) take() ([]agent.Record, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	records := q.records
	q.records, q.lines = nil, nil
	notify(q.taken)
	return records, q.err
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
