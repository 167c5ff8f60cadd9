package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
)

// guest is a dialer whose streams are answered in this process.
type guest func(h Header, c net.Conn)

func (g guest) Dial(context.Context, uint32) (net.Conn, error) {
	ours, theirs := net.Pipe()
	go func() {
		defer theirs.Close()
		var h Header
		if ReadMessage(theirs, &h) == nil {
			g(h, theirs)
		}
	}()
	return ours, nil
}

// accept answers with success, then hands over.
func accept(serve func(c net.Conn)) guest {
	return func(_ Header, c net.Conn) {
		if WriteMessage(c, Reply{}) == nil {
			serve(c)
		}
	}
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestReplyKinds(t *testing.T) {
	c := NewClient(guest(func(_ Header, c net.Conn) {
		WriteMessage(c, Reply{Error: "no such container\x1b[31m\n" + strings.Repeat("x", 5000), Code: "not found"})
	}))
	_, err := c.Exec(within(t), Exec{Container: "a"}, IO{})
	if !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
	if len(err.Error()) > textMax+100 || strings.ContainsAny(err.Error(), "\x1b\n") {
		t.Errorf("the guest's text came through as it is: %q", err)
	}
	for _, kind := range codes {
		if err := ReplyTo(kind).Err(); !errors.Is(err, kind) {
			t.Errorf("%v became %v", kind, err)
		}
	}
	if err := ReplyTo(nil).Err(); err != nil {
		t.Error(err)
	}
	if err := (Reply{Error: "x", Code: "nonsense"}).Err(); !errdefs.IsInternal(err) {
		t.Error(err)
	}
}

func TestExecRelays(t *testing.T) {
	c := NewClient(accept(func(c net.Conn) {
		r, w := NewFrameReader(c), NewFrameWriter(c)
		for {
			k, body, err := r.Read()
			if err != nil {
				return
			}
			if k == FrameStdin && len(body) == 0 {
				break
			}
			w.Stream(FrameStdout).Write(body)
			w.Stream(FrameStderr).Write([]byte("!"))
		}
		w.End(FrameStdout)
		w.Write(FrameExit, []byte{0, 0, 0, 7})
	}))
	in := strings.Repeat("0123456789", 20000)
	var out, errs bytes.Buffer
	code, err := c.Exec(within(t), Exec{Container: "a"}, IO{Stdin: strings.NewReader(in), Stdout: &out, Stderr: &errs})
	if err != nil || code != 7 {
		t.Fatalf("got %d, %v", code, err)
	}
	if out.String() != in || errs.Len() == 0 {
		t.Errorf("got %d bytes of %d, and %q", out.Len(), len(in), errs.String())
	}
}

func TestExecEndsWithContext(t *testing.T) {
	gone := make(chan struct{})
	c := NewClient(accept(func(c net.Conn) { io.Copy(io.Discard, c); close(gone) }))
	ctx, cancel := context.WithCancel(within(t))
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := c.Exec(ctx, Exec{Container: "a"}, IO{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	<-gone
}

func TestHostileFrames(t *testing.T) {
	huge := append([]byte{byte(FrameStdout)}, 0xff, 0xff, 0xff, 0xff)
	for name, bytes := range map[string][]byte{
		"huge frame": huge, "unknown type": {99, 0, 0, 0, 0}, "short exit": {byte(FrameExit), 0, 0, 0, 1, 0},
		"cut frame": {byte(FrameStdout), 0, 0, 0, 9, 'x'}, "nothing": nil,
	} {
		c := NewClient(accept(func(c net.Conn) { c.Write(bytes) }))
		if _, err := c.Exec(within(t), Exec{Container: "a"}, IO{}); err == nil {
			t.Errorf("%s: exec took it", name)
		}
		o, err := c.Output(within(t), "a", 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := o.Next(); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%s: output took it: %v", name, err)
		}
		o.Close()
	}
	head := binary.BigEndian.AppendUint32(nil, HeaderMax+1)
	c := NewClient(guest(func(_ Header, c net.Conn) { c.Write(head) }))
	if _, err := c.PortForward(within(t), 1); !errdefs.IsUnavailable(err) {
		t.Errorf("a huge reply: %v", err)
	}
}

func TestOutputInOrder(t *testing.T) {
	acks := make(chan uint64, 1)
	c := NewClient(accept(func(c net.Conn) {
		w := NewFrameWriter(c)
		w.Write(FrameOutput, AppendRecord(nil, Record{Offset: 0, Line: []byte("one")}))
		var ack [8]byte
		io.ReadFull(c, ack[:])
		acks <- binary.BigEndian.Uint64(ack[:])
		w.End(FrameOutput)
		io.Copy(io.Discard, c)
	}))
	o, err := c.Output(within(t), "a", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	r, err := o.Next()
	if err != nil || string(r.Line) != "one" {
		t.Fatalf("got %+v, %v", r, err)
	}
	if err := o.Ack(4); err != nil || <-acks != 4 {
		t.Fatal(err)
	}
	if _, err := o.Next(); err != io.EOF {
		t.Errorf("got %v", err)
	}
	c = NewClient(accept(func(c net.Conn) {
		NewFrameWriter(c).Write(FrameOutput, AppendRecord(nil, Record{Offset: 5}))
	}))
	if o, err = c.Output(within(t), "a", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := o.Next(); !errdefs.IsInternal(err) {
		t.Errorf("a gap: %v", err)
	}
	o.Close()
}

// stub is a service of which the tests use two methods.
type stub struct{ AgentService }

func (stub) Start(context.Context, *StartRequest) (*StartResponse, error) {
	return nil, errgrpc.ToGRPC(errors.Join(errors.New("it has exited"), errdefs.ErrFailedPrecondition))
}
func (stub) Remove(context.Context, *RemoveRequest) (*Empty, error) { return &Empty{}, nil }
func (stub) Watch(ctx context.Context, _ *WatchRequest, w Agent_WatchServer) error {
	if err := w.Send(&ContainerState{Synced: true}); err != nil {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}

func TestRPCRedials(t *testing.T) {
	conns := make(chan net.Conn, 8)
	c := NewClient(accept(func(conn net.Conn) {
		s, err := ttrpc.NewServer()
		if err != nil {
			return
		}
		RegisterAgentService(s, stub{})
		conns <- conn
		l := &oneConn{conn: conn, done: make(chan struct{})}
		s.Serve(context.Background(), l)
	}))
	ctx := within(t)
	for range 2 {
		r, err := c.RPC(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Remove(ctx, &RemoveRequest{Id: "a"}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Start(ctx, &StartRequest{Id: "a"}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "it has exited") {
			t.Errorf("got %v", err)
		}
		t1, _ := c.current()
		(<-conns).Close()
		t1.UserOnCloseWait(ctx)
		if _, err := r.Remove(ctx, &RemoveRequest{Id: "a"}); !errdefs.IsUnavailable(err) {
			t.Errorf("over a broken stream: %v", err)
		}
	}
	r, err := c.RPC(ctx)
	if err != nil {
		t.Fatal(err)
	}
	watching, stop := context.WithCancel(ctx)
	w, err := r.Watch(watching, &WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if s, err := w.Recv(); err != nil || !s.Synced {
		t.Errorf("got %v, %v", s, err)
	}
	stop()
	if _, err := w.Recv(); err == nil {
		t.Error("the watch outlived its context")
	}
	c.Close()
	if _, err := c.RPC(ctx); !errdefs.IsUnavailable(err) {
		t.Errorf("after Close: %v", err)
	}
}

type oneConn struct {
	conn net.Conn
	done chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	if c := l.conn; c != nil {
		l.conn = nil
		return c, nil
	}
	<-l.done
	return nil, net.ErrClosed
}
func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{} }

func FuzzParseRecord(f *testing.F) {
	f.Add(AppendRecord(nil, Record{Offset: 1, Time: 2, Stderr: true, Line: []byte("x")}))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRecord(b)
		if err == nil && !bytes.Equal(AppendRecord(nil, r), b) {
			t.Errorf("%+v does not become %x", r, b)
		}
	})
}
