package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// buffer is a bytes.Buffer that can be waited for.
type buffer struct {
	mu   sync.Mutex
	b    bytes.Buffer
	more chan struct{}
}

func newBuffer() *buffer { return &buffer{more: make(chan struct{}, 1)} }

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case b.more <- struct{}{}:
	default:
	}
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// await waits until the text has come.
func (b *buffer) await(t *testing.T, text string) {
	t.Helper()
	limit := time.After(20 * time.Second)
	for !strings.Contains(b.String(), text) {
		select {
		case <-b.more:
		case <-limit:
			t.Fatalf("%q did not come, but %q", text, b.String())
		}
	}
}

func TestAttach(t *testing.T) {
	ctx, c := startAgent(t)
	r, _ := create(t, ctx, c, "one", specOf("sh", "-c", `echo ready; while read x; do echo "got $x"; echo "err $x" >&2; done; echo bye; exit 6`), &agent.CreateRequest{Stdin: true, StdinOnce: true})
	r.start()
	in, typed := io.Pipe()
	out, errs := newBuffer(), newBuffer()
	done := make(chan error, 1)
	go func() { done <- c.Attach(ctx, "one", false, agent.IO{Stdin: in, Stdout: out, Stderr: errs}) }()
	// A second one that only listens.
	second, stop := context.WithCancel(ctx)
	listened := newBuffer()
	stopped := make(chan error, 1)
	go func() { stopped <- c.Attach(second, "one", false, agent.IO{Stdout: listened}) }()
	for i := 0; !strings.Contains(out.String(), "got") || !strings.Contains(listened.String(), "got"); i++ {
		fmt.Fprintf(typed, "line %d\n", i)
		time.Sleep(10 * time.Millisecond)
	}
	errs.await(t, "err line")
	stop()
	if err := <-stopped; !errors.Is(err, context.Canceled) {
		t.Errorf("the second one: %v", err)
	}
	typed.Close()
	if err := <-done; err != nil {
		t.Errorf("attach: %v", err)
	}
	out.await(t, "bye\n")
	if s := r.wait(); s.ExitCode != 6 {
		t.Errorf("got %v", s)
	}
	if err := c.Attach(ctx, "one", false, agent.IO{Stdout: out}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("attach to what has ended: %v", err)
	}
	if logged, _ := r.logs(); !strings.HasPrefix(logged, "ready\ngot line 0\n") || !strings.HasSuffix(logged, "bye\n") {
		t.Errorf("log: %q", logged)
	}
}

func TestStdinStays(t *testing.T) {
	ctx, c := startAgent(t)
	r, _ := create(t, ctx, c, "one", specOf("cat"), &agent.CreateRequest{Stdin: true})
	r.start()
	for _, text := range []string{"first\n", "second\n"} {
		attached, stop := context.WithCancel(ctx)
		out := newBuffer()
		done := make(chan error, 1)
		go func() {
			done <- c.Attach(attached, "one", false, agent.IO{Stdin: strings.NewReader(text), Stdout: out})
		}()
		out.await(t, text)
		stop()
		<-done
	}
	if !r.running() {
		t.Error("it ended with its client")
	}
	r.remove()
}

// running asks whether the container runs.
func (r *run) running() bool {
	code, _, _ := r.exec(nil, "true")
	return code == 0
}

func TestTerminal(t *testing.T) {
	ctx, c := startAgent(t)
	spec := specOf("sh", "-c", `tty=$(readlink /proc/self/fd/0); echo "on $tty"; while read x; do stty size; echo "got $x"; done`)
	spec.Process.Terminal = true
	spec.Process.ConsoleSize = &specs.Box{Width: 80, Height: 25}
	r, _ := create(t, ctx, c, "one", spec, &agent.CreateRequest{Stdin: true})
	in, typed := io.Pipe()
	out := newBuffer()
	sizes := make(chan agent.WindowSize)
	done := make(chan error, 1)
	go func() {
		done <- c.Attach(ctx, "one", true, agent.IO{Stdin: in, Stdout: out, Resize: sizes})
	}()
	time.Sleep(100 * time.Millisecond) // the client should be there at the start
	r.start()
	out.await(t, "on /dev/")
	sizes <- agent.WindowSize{Width: 132, Height: 43}
	sizes <- agent.WindowSize{Width: 132, Height: 43} // when it is taken, the first one was sent
	fmt.Fprint(typed, "hello\n")
	out.await(t, "43 132\r\n")
	out.await(t, "got hello\r\n")
	fmt.Fprint(typed, "\x04") // the end of input
	if err := <-done; err != nil {
		t.Error(err)
	}
	if logged, errs := r.logs(); !strings.Contains(logged, "got hello\r\n") || errs != "" {
		t.Errorf("log: %q, %q", logged, errs)
	}
}

func TestPortForward(t *testing.T) {
	ctx, c := startAgent(t)
	r, _ := create(t, ctx, c, "one", specOf("nc", "-l", "-p", "8080", "-e", "cat"), &agent.CreateRequest{})
	r.start()
	var conn net.Conn
	for {
		var err error
		if conn, err = c.PortForward(ctx, 8080); err == nil {
			break
		} else if !errdefs.IsFailedPrecondition(err) || ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	defer conn.Close()
	text := strings.Repeat("through and back\n", 20000)
	go func() {
		io.WriteString(conn, text)
		conn.(closeWriter).CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if err != nil || string(got) != text {
		t.Errorf("got %d bytes of %d, %v", len(got), len(text), err)
	}
	if _, err := c.PortForward(ctx, 9); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "port 9") {
		t.Errorf("a port without a server: %v", err)
	}
}
