package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	grpccodes "google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// send writes a message of ttrpc's.
func send(c net.Conn, stream uint32, kind byte, body []byte) error {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(body)))
	b = append(binary.BigEndian.AppendUint32(b, stream), kind, 0)
	_, err := c.Write(append(b, body...))
	return err
}

// readRequest reads what the host asks, and returns the stream that it asks on.
func readRequest(c net.Conn) (stream uint32, err error) {
	var head [messageHead]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return 0, err
	}
	_, err = io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(head[:])))
	return binary.BigEndian.Uint32(head[4:]), err
}

// answering is a guest that answers each request with some messages.
func answering(kind byte, bodies ...[]byte) guest {
	return accept(func(c net.Conn) {
		for {
			stream, err := readRequest(c)
			for _, body := range bodies {
				if err == nil {
					err = send(c, stream, kind, body)
				}
			}
			if err != nil {
				return
			}
		}
	})
}

// deaf is a guest that answers handshakes, and reads nothing after them.
func deaf(t *testing.T) guest {
	end := make(chan struct{})
	t.Cleanup(func() { close(end) })
	return accept(func(net.Conn) { <-end })
}

// marshal makes a message; what can't be one is a mistake of the test.
func marshal(m proto.Message) []byte {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	return b
}

// TestCallOfDeafGuest: a call ends with its context, and the stream when nothing of it was read for long.
func TestCallOfDeafGuest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, began := NewClient(deaf(t)), time.Now()
		r, err := c.RPC(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := r.Remove(ctx, &RemoveRequest{}); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		time.Sleep(writeLimit)
		if now, _ := c.current(); now != nil {
			t.Error("the client keeps a stream that is not read")
		}
		if r, err = c.RPC(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Remove(t.Context(), &RemoveRequest{}); !errdefs.IsUnavailable(err) {
			t.Errorf("a call without a limit: %v", err)
		}
	})
}

// TestCallsOfDeafGuest: calls that were given up do not pile up.
func TestCallsOfDeafGuest(t *testing.T) {
	c := NewClient(deaf(t))
	r, err := c.RPC(within(t))
	if err != nil {
		t.Fatal(err)
	}
	before, _ := c.current()
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for range lateMax + 1 {
		if _, err := r.Remove(over, &RemoveRequest{}); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	if err := before.UserOnCloseWait(within(t)); err != nil {
		t.Errorf("the stream goes on: %v", err)
	}
}

func TestWatchOfDeafGuest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewClient(deaf(t))
		r, err := c.RPC(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if _, err := r.Watch(ctx, &WatchRequest{}); err == nil || time.Since(began) != time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
	})
}

// stuck is a stream whose writes look at no deadline, as those of yamux in a session that the guest does not
// read.
type stuck struct {
	net.Conn
	writing, closed chan struct{}
}

func (s stuck) Dial(context.Context, uint32) (net.Conn, error) { return s, nil }
func (s stuck) SetDeadline(time.Time) error                    { return nil }

func (s stuck) Write([]byte) (int, error) {
	close(s.writing)
	<-s.closed
	return 0, net.ErrClosed
}

func (s stuck) Close() error {
	close(s.closed)
	return nil
}

func TestHandshakeOfDeafGuest(t *testing.T) {
	s := stuck{writing: make(chan struct{}), closed: make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	opened := make(chan error, 1)
	go func() {
		_, err := NewClient(s).RPC(ctx)
		opened <- err
	}()
	<-s.writing
	cancel()
	select {
	case err := <-opened:
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		<-s.closed
	case <-within(t).Done():
		t.Error("it waits on")
	}
}

// TestHostileAnswers: the stream ends with an answer that is too long, or that nobody waits for.
func TestHostileAnswers(t *testing.T) {
	ok := marshal(&ttrpc.Response{})
	unasked := func(c net.Conn) {
		if send(c, 1, typeResponse, ok) == nil {
			io.Copy(io.Discard, c)
		}
	}
	for name, one := range map[string]struct {
		guest
		calls int
	}{
		"long":    {answering(typeResponse, make([]byte, answerMax+1)), 1},
		"second":  {answering(typeResponse, ok, ok), 1},
		"unasked": {accept(unasked), 0},
	} {
		c := NewClient(one.guest)
		t1, err := c.connect(within(t))
		if err != nil {
			t.Fatal(err)
		}
		for range one.calls {
			if _, err := NewAgentClient(t1).Remove(within(t), &RemoveRequest{}); err != nil && !errdefs.IsUnavailable(err) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if err := t1.UserOnCloseWait(within(t)); err != nil {
			t.Errorf("%s: the stream goes on", name)
		}
		if now, err := c.current(); now != nil || err != nil {
			t.Errorf("%s: the client keeps it: %v", name, err)
		}
	}
}

// TestHostileDetails: the errors that a guest adds to one as its details are not read.
func TestHostileDetails(t *testing.T) {
	inner, err := status.New(grpccodes.NotFound, "inner").WithDetails(&RemoveRequest{})
	if err != nil {
		t.Fatal(err)
	}
	outer, err := status.New(grpccodes.Unavailable, "outer").WithDetails(inner.Proto())
	if err != nil {
		t.Fatal(err)
	}
	c := NewClient(answering(typeResponse, marshal(&ttrpc.Response{Status: outer.Proto()})))
	defer c.Close()
	r, err := c.RPC(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Remove(within(t), &RemoveRequest{}); err == nil || err.Error() != "outer" || !errdefs.IsUnavailable(err) || errdefs.IsNotFound(err) {
		t.Errorf("%v, want the outer error alone", err)
	}
}

// TestHostileStates: a watch ends with a state that is too long, or has too many files.
func TestHostileStates(t *testing.T) {
	long := &WrittenFile{Content: make([]byte, stateMax)}
	for name, g := range map[string]guest{
		"long":       answering(typeData, marshal(&ContainerState{Files: []*WrittenFile{long}})),
		"long end":   answering(typeResponse, marshal(&ttrpc.Response{Payload: make([]byte, answerMax)})),
		"many files": answering(typeData, bytes.Repeat([]byte{filesField<<3 | 2, 0}, WrittenFiles+1)),
		"cut":        answering(typeData, []byte{filesField<<3 | 2, 9, 0}),
	} {
		c := NewClient(g)
		r, err := c.RPC(within(t))
		if err != nil {
			t.Fatal(err)
		}
		w, err := r.Watch(within(t), &WatchRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Recv(); !errdefs.IsUnavailable(err) {
			t.Errorf("%s: %v", name, err)
		}
		c.Close()
	}
}

// TestStatesWait: the host takes no more from a guest than somebody reads.
func TestStatesWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const states = 20
		body := marshal(&ContainerState{Files: []*WrittenFile{{Content: make([]byte, WrittenAll)}}})
		var sent atomic.Int64
		c := NewClient(accept(func(c net.Conn) {
			stream, err := readRequest(c)
			for err == nil && sent.Load() < states {
				if err = send(c, stream, typeData, body); err == nil {
					sent.Add(1)
				}
			}
			io.Copy(io.Discard, c)
		}))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		w, err := (rpc{c: c}).Watch(ctx, &WatchRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range int64(states) {
			synctest.Wait()
			if n := sent.Load(); n > i+1 {
				t.Fatalf("%d were taken from the guest, and %d from the stream", n, i)
			}
			if _, err := w.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		cancel()
		if _, err := w.Recv(); err == nil {
			t.Error("the watch outlived its context")
		}
	})
}

// TestHonestGuestFits: the limits have room for the most that a guest may have to say.
func TestHonestGuestFits(t *testing.T) {
	data := &PSIData{TotalUs: math.MaxUint64, Avg10: 0.1, Avg60: 0.1, Avg300: 0.1}
	psi := &PSI{Full: data, Some: data}
	id := strings.Repeat("a", 64)
	const most = math.MaxUint64
	stats := &StatsResponse{}
	for range 400 {
		stats.Containers = append(stats.Containers, &ContainerStats{Id: id, LayerBytes: most, LayerInodes: most, Cgroup: &Cgroup{
			CpuUsageNs: most, MemoryUsage: most, MemoryWorkingSet: most, MemoryRss: most, MemoryLimit: most, PageFaults: most,
			MajorPageFaults: most, SwapUsage: most, Pids: most, CpuPsi: psi, MemoryPsi: psi, IoPsi: psi,
		}})
	}
	c := NewClient(answering(typeResponse, marshal(&ttrpc.Response{Payload: marshal(stats)})))
	defer c.Close()
	r, err := c.RPC(within(t))
	if err != nil {
		t.Fatal(err)
	}
	got, err := r.Stats(within(t), &StatsRequest{})
	if err != nil || !proto.Equal(got, stats) {
		t.Errorf("%d of %d containers, %v", len(got.GetContainers()), len(stats.Containers), err)
	}
	state := &ContainerState{
		Id: id, State: State_STATE_EXITED, StartedNs: math.MaxInt64, FinishedNs: math.MaxInt64, ExitCode: -1, OomKilled: true,
	}
	for range WrittenFiles {
		state.Files = append(state.Files, &WrittenFile{Name: id[:32], Content: make([]byte, WrittenAll/WrittenFiles)})
	}
	c = NewClient(answering(typeData, marshal(state)))
	w, err := (rpc{c: c}).Watch(within(t), &WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := w.Recv(); err != nil || !proto.Equal(got, state) {
		t.Errorf("%d of %d files, %v", len(got.GetFiles()), len(state.Files), err)
	}
}
