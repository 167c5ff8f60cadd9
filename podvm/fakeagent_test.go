package podvm

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// fakeAgent is the agent of one VM, in this process. It does as it is told, or what a test tells it.
type fakeAgent struct {
	mu         sync.Mutex
	changed    chan struct{} // closed and replaced when something changes
	fail       map[string]error
	before     map[string]func() // called when a call comes in
	calls      map[string]int
	setup      *agent.SetupRequest
	network    *agent.NetworkRequest
	containers map[string]*fakeContainer
	files      []*agent.Files
	reports    []*agent.ContainerState // sent to watchers as they are
	behind     time.Duration           // its clock, the node's
	silent     bool                    // new streams are not answered
	streams    int                     // that were answered
}

type fakeContainer struct {
	request *agent.CreateRequest
	state   *agent.ContainerState
	signals []int32
	output  []agent.Record
	acked   uint64
	ended   bool // no more output comes
	update  []byte
}

func newFakeAgent() *fakeAgent {
	return &fakeAgent{
		changed: make(chan struct{}), fail: map[string]error{}, before: map[string]func(){}, calls: map[string]int{},
		containers: map[string]*fakeContainer{},
	}
}

// do changes the agent's state and wakes who waits for a change.
func (a *fakeAgent) do(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
	close(a.changed)
	a.changed = make(chan struct{})
}

// answered is how many streams there were.
func (a *fakeAgent) answered() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.streams
}

// silence leaves new streams without an answer, until speak is called.
func (a *fakeAgent) silence() (speak func()) {
	a.do(func() { a.silent = true })
	return func() { a.do(func() { a.silent = false }) }
}

// untilSpoken returns when a stream may be answered.
func (a *fakeAgent) untilSpoken() {
	for {
		a.mu.Lock()
		silent, changed := a.silent, a.changed
		if !silent {
			a.streams++
		}
		a.mu.Unlock()
		if !silent {
			return
		}
		<-changed
	}
}

// call notes a call, and returns the error that it is to have.
func (a *fakeAgent) call(method string) error {
	a.mu.Lock()
	a.calls[method]++
	err, before := a.fail[method], a.before[method]
	a.mu.Unlock()
	if before != nil {
		before()
	}
	if err != nil {
		return errgrpc.ToGRPC(err)
	}
	return nil
}

// exit ends a container as its process would.
func (a *fakeAgent) exit(id string, code int32, files ...*agent.WrittenFile) {
	a.do(func() {
		c := a.containers[id]
		if c == nil || c.state.State == agent.State_STATE_EXITED {
			return
		}
		c.ended = true
		c.state = &agent.ContainerState{
			Id: id, State: agent.State_STATE_EXITED, StartedNs: c.state.StartedNs, FinishedNs: time.Now().UnixNano(), ExitCode: code, Files: files,
		}
	})
}

// say has a container write a line.
func (a *fakeAgent) say(id, line string) {
	a.do(func() {
		c := a.containers[id]
		offset := uint64(0)
		if n := len(c.output); n > 0 {
			offset = c.output[n-1].Offset + agent.RecordSize(len(c.output[n-1].Line))
		}
		c.output = append(c.output, agent.Record{Offset: offset, Time: time.Now().UnixNano(), Line: []byte(line)})
	})
}

func (a *fakeAgent) container(id string) *fakeContainer {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.containers[id]
}

func (a *fakeAgent) has(id string) (*fakeContainer, error) {
	if c := a.container(id); c != nil {
		return c, nil
	}
	return nil, errgrpc.ToGRPC(fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound))
}

// serve answers a stream.
func (a *fakeAgent) serve(conn net.Conn) {
	defer conn.Close()
	var h agent.Header
	if agent.ReadMessage(conn, &h) != nil {
		return
	}
	a.untilSpoken()
	if h.Kind == agent.KindOutput {
		a.sendOutput(conn, h)
		return
	}
	if agent.WriteMessage(conn, agent.Reply{}) != nil {
		return
	}
	switch h.Kind {
	case agent.KindRPC:
		a.serveRPC(conn)
	case agent.KindExec:
		w := agent.NewFrameWriter(conn)
		w.Write(agent.FrameStdout, h.Process)
		w.Write(agent.FrameExit, []byte{0, 0, 0, 3})
	case agent.KindPortForward:
		io.Copy(conn, conn)
	}
}

func (a *fakeAgent) serveRPC(conn net.Conn) {
	s, err := ttrpc.NewServer()
	if err != nil {
		return
	}
	agent.RegisterAgentService(s, a)
	l := &oneConn{conn: make(chan net.Conn, 1), done: make(chan struct{})}
	closed := &closeNoted{Conn: conn, closed: sync.OnceFunc(func() { close(l.done) })}
	l.conn <- closed
	s.Serve(context.Background(), l)
	s.Close()
}

// oneConn listens for one connection and ends with it.
type oneConn struct {
	conn chan net.Conn
	done chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{} }

type closeNoted struct {
	net.Conn
	closed func()
}

func (c *closeNoted) Close() error { c.closed(); return c.Conn.Close() }

// sendOutput sends what a container said, from the offset on, and what it says from then on.
func (a *fakeAgent) sendOutput(conn net.Conn, h agent.Header) {
	c, err := a.has(h.Container)
	a.mu.Lock()
	if err == nil && h.Offset < c.acked {
		err = fmt.Errorf("offset %d is acknowledged: %w", h.Offset, errdefs.ErrInvalidArgument)
	}
	a.mu.Unlock()
	if c == nil {
		err = errdefs.ErrNotFound
	}
	if agent.WriteMessage(conn, agent.ReplyTo(err)) != nil || err != nil {
		return
	}
	gone := make(chan struct{})
	go a.readAcks(conn, c, gone)
	w := agent.NewFrameWriter(conn)
	for next := h.Offset; ; {
		a.mu.Lock()
		send, ended, changed := after(c.output, next), c.ended, a.changed
		a.mu.Unlock()
		for _, r := range send {
			if w.Write(agent.FrameOutput, agent.AppendRecord(nil, r)) != nil {
				return
			}
			next = r.Offset + agent.RecordSize(len(r.Line))
		}
		if ended {
			w.End(agent.FrameOutput)
			<-gone
			return
		}
		select {
		case <-changed:
		case <-gone:
			return
		}
	}
}

func (a *fakeAgent) readAcks(conn net.Conn, c *fakeContainer, gone chan struct{}) {
	defer close(gone)
	for {
		var b [8]byte
		if _, err := io.ReadFull(conn, b[:]); err != nil {
			return
		}
		a.do(func() { c.acked = max(c.acked, binary.BigEndian.Uint64(b[:])) })
	}
}
