package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"runtime/debug"
	"strings"
	"time"

	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/utils/exec"

	"github.com/caisson-vm/caisson/podvm"
	"github.com/caisson-vm/caisson/podvm/agent"
)

// headerLimit is how long a client may take to send a request's header.
const headerLimit = 30 * time.Second

// streams serves the bytes of exec, attach and port-forward by SPDY and WebSocket, on a port of
// the loopback interface. Its URLs hold a random token that is good once, for a minute: without
// one of them the port does nothing.
type streams struct {
	pods    Pods
	log     *slog.Logger
	server  streaming.Server
	http    *http.Server
	clients clients
	done    chan struct{} // closed by Close
	ended   chan error    // what http.Serve returned
}

func newStreams(ctx context.Context, pods Pods, log *slog.Logger) (*streams, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for exec, attach and port-forward: %w", err)
	}
	s := &streams{pods: pods, log: log, done: make(chan struct{}), ended: make(chan error, 1)}
	config := streaming.DefaultConfig
	config.BaseURL = &url.URL{Scheme: "http", Host: l.Addr().String()}
	if s.server, err = streaming.NewServer(config, s); err != nil {
		return nil, errors.Join(fmt.Errorf("streaming server: %w", err), l.Close())
	}
	s.http = &http.Server{Handler: s.clients.serve(s.server), ConnContext: withConn, ReadHeaderTimeout: headerLimit}
	go func() { s.ended <- s.http.Serve(l) }()
	return s, nil
}

// Close ends all streams.
func (s *streams) Close() error {
	close(s.done)
	err := s.http.Close()
	if served := <-s.ended; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}

// Exec runs a command for a client that has connected. It implements streaming.Runtime.
func (s *streams) Exec(ctx context.Context, id string, command []string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) (err error) {
	ctx, end := s.begin(ctx, nil, "exec", "container", id, &err)
	defer end()
	c, in, err := s.target(id, in)
	if err != nil {
		return err
	}
	code, err := c.Exec(ctx, podvm.ExecConfig{Command: command, TTY: tty}, stdio(ctx, in, out, errOut, resize))
	if err != nil {
		return err
	}
	if code != 0 {
		return exec.CodeExitError{Err: fmt.Errorf("exit code %d", code), Code: int(code)}
	}
	return nil
}

// Attach connects a client to a container until either of them ends.
func (s *streams) Attach(ctx context.Context, id string, in io.Reader, out, errOut io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) (err error) {
	ctx, end := s.begin(ctx, nil, "attach", "container", id, &err)
	defer end()
	c, in, err := s.target(id, in)
	if err != nil {
		return err
	}
	return c.Attach(ctx, stdio(ctx, in, out, errOut, resize))
}

// PortForward carries one connection to a port inside the pod, until its ends or its client have gone.
func (s *streams) PortForward(ctx context.Context, id string, port int32, stream io.ReadWriteCloser) (err error) {
	ctx, end := s.begin(ctx, s.clients.of(stream), "port-forward", "pod", id, &err)
	defer end()
	if err := checkPort(port); err != nil {
		return err
	}
	p, err := s.pods.Pod(id)
	if err != nil {
		return err
	}
	return p.PortForward(ctx, uint16(port), stream)
}

// withStdin marks the ids of streams whose client asked for stdin. Over WebSocket the library hands
// out an empty stdin where none was asked for, and its end would close that of the container.
const withStdin = "/stdin"

func streamTarget(c Container, stdin bool) string {
	if stdin {
		return c.Status().ID + withStdin
	}
	return c.Status().ID
}

// target is what streamTarget named, and in where it was asked for.
func (s *streams) target(id string, in io.Reader) (Container, io.Reader, error) {
	id, stdin := strings.CutSuffix(id, withStdin)
	if !stdin {
		in = nil
	}
	c, err := s.pods.Container(id)
	if err != nil {
		return nil, nil, err
	}
	return c, in, checkRunning(c)
}

// begin ties a stream's context to the server, and to its client where that has a channel; the function it returns
// ends the stream: it turns a panic into an error and writes the log line.
func (s *streams) begin(ctx context.Context, gone <-chan struct{}, what, key, id string, err *error) (context.Context, func()) {
	began := time.Now()
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-s.done:
			cancel()
		case <-gone:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		cancel()
		if p := recover(); p != nil {
			*err = errors.New("caissond met an error of its own; its log has the stack")
			s.log.Error("panic", "stream", what, "panic", p, "stack", string(debug.Stack()))
		}
		args := []any{key, id, "ms", time.Since(began).Milliseconds()}
		if *err != nil {
			args = append(args, "err", *err)
		}
		s.log.Debug(what+" ended", args...)
	}
}

// stdio are a client's streams; those it did not ask for stay nil.
func stdio(ctx context.Context, in io.Reader, out, errOut io.WriteCloser, resize <-chan remotecommand.TerminalSize) agent.IO {
	var stdio agent.IO
	if in != nil {
		stdio.Stdin = in
	}
	if out != nil {
		stdio.Stdout = out
	}
	if errOut != nil {
		stdio.Stderr = errOut
	}
	if resize != nil {
		stdio.Resize = sizes(ctx, resize)
	}
	return stdio
}

func sizes(ctx context.Context, from <-chan remotecommand.TerminalSize) <-chan agent.WindowSize {
	to := make(chan agent.WindowSize)
	go func() {
		defer close(to)
		for {
			select {
			case size, ok := <-from:
				if !ok {
					return
				}
				select {
				case to <- agent.WindowSize{Width: size.Width, Height: size.Height}:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return to
}
