package guest

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
)

// tapWait is how long a container's output waits for an attached client that does not read.
const tapWait = 10 * time.Second

// tap is one attached client's part of a container's output.
type tap struct {
	frames chan frame
	// gone is closed when the client has ended.
	gone chan struct{}
	once sync.Once
}

type frame struct {
	t    agent.FrameType
	body []byte
}

func (t *tap) leave() { t.once.Do(func() { close(t.gone) }) }

// taps are those attached to a container.
type taps struct {
	mu    sync.Mutex
	all   []*tap
	ended bool
}

// add returns nil when there is no more output to come.
func (t *taps) add() *tap {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return nil
	}
	k := &tap{frames: make(chan frame, 16), gone: make(chan struct{})}
	t.all = append(t.all, k)
	return k
}

func (t *taps) remove(k *tap) {
	k.leave()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.all = slices.DeleteFunc(t.all, func(o *tap) bool { return o == k })
}

func (t *taps) list() []*tap {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.all)
}

// pass gives output to all clients. One that does not take it for long is cut off.
func (t *taps) pass(kind agent.FrameType, p []byte) {
	all := t.list()
	if len(all) == 0 {
		return
	}
	f := frame{kind, slices.Clone(p)}
	for _, k := range all {
		select {
		case k.frames <- f:
			continue
		default:
		}
		timer := time.NewTimer(tapWait)
		select {
		case k.frames <- f:
		case <-k.gone:
		case <-timer.C:
			t.remove(k)
		}
		timer.Stop()
	}
}

// end tells all clients that this was all.
func (t *taps) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = true
	for _, k := range t.all {
		close(k.frames)
	}
}

// relay moves the container's output to those attached and into its records, until its end.
func (c *container) relay() {
	var both sync.WaitGroup
	if c.io.console != nil {
		both.Go(func() { c.relayOne(c.io.console, agent.FrameStdout) })
	} else {
		both.Go(func() { c.relayOne(c.io.stdout, agent.FrameStdout) })
		both.Go(func() { c.relayOne(c.io.stderr, agent.FrameStderr) })
	}
	both.Wait()
	// A process may close its output and live on.
	<-c.exited
	c.out.end()
	c.taps.end()
}

func (c *container) relayOne(f *os.File, kind agent.FrameType) {
	lines := splitter{stderr: kind == agent.FrameStderr}
	var records []agent.Record
	read(f, func(p []byte) error {
		c.taps.pass(kind, p)
		records = lines.split(p, records[:0])
		return c.out.add(records)
	})
	c.out.add(lines.rest())
}

// attach serves a stream that is joined to a container's process.
func (a *Agent) attach(conn net.Conn, h agent.Header) error {
	c, err := a.container(h.Container)
	if err != nil {
		return refuse(conn, err)
	}
	t := c.taps.add()
	if t == nil || c.now().State == agent.State_STATE_EXITED {
		return refuse(conn, fmt.Errorf("container %s has exited: %w", c.id, errdefs.ErrFailedPrecondition))
	}
	defer c.taps.remove(t)
	if err := agent.WriteMessage(conn, agent.Reply{}); err != nil {
		return err
	}
	go func() {
		defer t.leave()
		c.takeInput(agent.NewFrameReader(conn))
		if h.Stdin && c.stdinOnce {
			c.io.endStdin()
		}
	}()
	return c.giveOutput(agent.NewFrameWriter(conn), t, h)
}

// takeInput reads what a client sends until it goes.
func (c *container) takeInput(r *agent.FrameReader) {
	for {
		t, body, err := r.Read()
		if err != nil {
			return
		}
		if t == agent.FrameStdin && len(body) == 0 {
			if c.stdinOnce {
				c.io.endStdin()
			}
			continue
		}
		if err := c.io.handle(t, body); err != nil {
			return
		}
	}
}

// handle does what a frame from the client says.
func (s *stdio) handle(t agent.FrameType, body []byte) error {
	switch t {
	case agent.FrameStdin:
		if len(body) == 0 {
			s.endStdin()
		} else {
			s.input(body)
		}
		return nil
	case agent.FrameResize:
		size, err := agent.ParseWindowSize(body)
		if err != nil {
			return err
		}
		return s.resize(size)
	}
	return fmt.Errorf("unexpected frame of type %d: %w", t, errdefs.ErrInvalidArgument)
}

func (c *container) giveOutput(w *agent.FrameWriter, t *tap, h agent.Header) error {
	for {
		select {
		case f, ok := <-t.frames:
			if !ok {
				return sendExit(w, c.now().ExitCode)
			}
			if f.t == agent.FrameStdout && !h.Stdout || f.t == agent.FrameStderr && !h.Stderr {
				continue
			}
			if err := w.Write(f.t, f.body); err != nil {
				return err
			}
		case <-t.gone:
			return nil
		}
	}
}

func sendExit(w *agent.FrameWriter, code int32) error {
	return w.Write(agent.FrameExit, binary.BigEndian.AppendUint32(nil, uint32(code)))
}
