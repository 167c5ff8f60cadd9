// Package guest is the agent in a pod's VM: the service of podvm/agent, and the byte streams
// beside it. It sets the guest up as one pod, and runs the pod's containers by crun. Its folder
// boot makes the guest usable before.
package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
)

// Options say how the agent runs. The zero value is right in a VM.
type Options struct {
	// Version is what Setup answers with.
	Version string
	// Root is where the agent keeps everything: bundles, mounts, files; "" is /run/caisson.
	Root string
	// Crun is the container runtime's program; "" is crun on the PATH.
	Crun string
	// Template, where set, is called when the guest is to become a template.
	Template func() error
	// NoCgroups runs containers without cgroups of their own, for tests where there are none.
	NoCgroups bool
}

const searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Agent runs one pod's containers.
type Agent struct {
	o       Options
	reaper  *reaper
	disks   *disks
	watch   *hub
	files   *fileSets
	vols    *volumes
	shares  *hostDirs
	cards   *cards
	entropy entropy
	pid     podPID
	// sealed is crun as it is run.
	sealed    *sealed
	collected sync.Once // the garbage of the first rehearsal

	mu sync.Mutex
	// setup is the answer to the one Setup, nil before.
	setup *agent.SetupResponse
	podID string
	// These are set in a template, for its clones.
	pack       *os.File
	prepared   bool // the rest is set
	names      *names
	scratch    string
	quotas     *quotas
	containers map[string]*container
}

// New returns an agent that reaps every child of this process: nothing else in it may wait for one.
func New(o Options) (*Agent, error) {
	if o.Root == "" {
		o.Root = "/run/caisson"
	}
	if o.Crun == "" {
		o.Crun = "crun"
	}
	// The kernel gives its first process no PATH.
	if os.Getenv("PATH") == "" {
		os.Setenv("PATH", searchPath)
	}
	crun, err := exec.LookPath(o.Crun)
	if err != nil {
		return nil, fmt.Errorf("find the container runtime: %w", err)
	}
	o.Crun = crun
	program, err := seal(crun)
	if err != nil {
		return nil, fmt.Errorf("seal the container runtime: %w", err)
	}
	for _, dir := range []string{"containers", "crun", "disks", "files", "layers", "shares", "volumes"} {
		if err := os.MkdirAll(filepath.Join(o.Root, dir), 0o711); err != nil {
			return nil, err
		}
	}
	withstand()
	r, err := newReaper()
	if err != nil {
		return nil, err
	}
	cards, err := newCards()
	if err != nil {
		return nil, err
	}
	entropy, err := openEntropy()
	if err != nil {
		return nil, err
	}
	a := &Agent{o: o, reaper: r, cards: cards, entropy: entropy, sealed: program, watch: newHub(), containers: make(map[string]*container), scratch: o.Root}
	a.disks = newDisks(a.path("disks"))
	a.files = newFileSets(a.path("files"))
	a.vols = newVolumes(a.path("volumes"))
	a.shares = newHostDirs(a.path("shares"))
	a.pid = podPID{agent: a, turn: make(chan struct{}, 1)}
	return a, nil
}

func (a *Agent) path(elem ...string) string {
	return filepath.Join(append([]string{a.o.Root}, elem...)...)
}

// Serve answers the streams of a listener until it fails or ctx ends.
func (a *Agent) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	context.AfterFunc(ctx, func() { l.Close() })
	s, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(toRPC))
	if err != nil {
		return err
	}
	agent.RegisterAgentService(s, service{a})
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			if err := a.stream(ctx, s, c); err != nil && !quiet(err) {
				slog.Warn("serve a stream", "err", err)
			}
		}()
	}
}

// quiet tells errors that only say that the host closed a stream.
func quiet(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, context.Canceled) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET)
}

func (a *Agent) stream(ctx context.Context, s *ttrpc.Server, c net.Conn) error {
	var h agent.Header
	if err := agent.ReadMessage(c, &h); err != nil {
		return err
	}
	switch h.Kind {
	case agent.KindRPC:
		if err := agent.WriteMessage(c, agent.Reply{}); err != nil {
			return err
		}
		return serveOne(ctx, s, c)
	case agent.KindExec:
		return a.exec(c, h)
	case agent.KindAttach:
		return a.attach(c, h)
	case agent.KindOutput:
		return a.output(c, h)
	case agent.KindPortForward:
		return portForward(ctx, c, h.Port)
	case agent.KindShare:
		return a.share(c, h)
	}
	return refuse(c, fmt.Errorf("agent %s serves no stream of kind %q: %w", a.o.Version, h.Kind, errdefs.ErrNotImplemented))
}

// refuse answers a stream's header with an error.
func refuse(c net.Conn, err error) error { return agent.WriteMessage(c, agent.ReplyTo(err)) }

// toRPC lets the kinds of errors cross the wire.
func toRPC(ctx context.Context, decode ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, call ttrpc.Method) (any, error) {
	resp, err := call(ctx, decode)
	return resp, errgrpc.ToGRPC(err)
}

// serveOne serves RPCs on one stream and returns at its end.
func serveOne(ctx context.Context, s *ttrpc.Server, c net.Conn) error {
	l := &single{conn: make(chan net.Conn, 1), done: make(chan struct{})}
	l.conn <- &notifying{Conn: c, done: l.done}
	if err := s.Serve(ctx, l); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// single is a listener of one connection; its Accept fails once that was closed.
type single struct {
	conn chan net.Conn
	done chan struct{}
}

func (l *single) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *single) Close() error   { return nil }
func (l *single) Addr() net.Addr { return &net.UnixAddr{Name: "stream"} }

// notifying tells when it was closed.
type notifying struct {
	net.Conn
	done chan struct{}
	once sync.Once
}

func (c *notifying) Close() error {
	defer c.once.Do(func() { close(c.done) })
	return c.Conn.Close()
}
