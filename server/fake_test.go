package server

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/caisson-vm/caisson/imagestore"
	"github.com/caisson-vm/caisson/podvm"
	"github.com/caisson-vm/caisson/podvm/agent"
)

// fakePods keeps pods and containers in memory, by the rules of podvm.Manager.
type fakePods struct {
	mu         sync.Mutex
	pods       []*fakePod
	containers []*fakeContainer
	readers    []chan podvm.Event
}

type fakePod struct {
	all    *fakePods
	status podvm.PodStatus
	stats  func(ctx context.Context) (podvm.PodStats, error)
	// forward is what PortForward does instead.
	forward func(ctx context.Context, stream io.ReadWriteCloser) error
	// updates are the resources of the calls of Update.
	updates []*podvm.Resources
	// refusal is the error of Create.
	refusal error
}

type fakeContainer struct {
	all    *fakePods
	status podvm.ContainerStatus
	exec   func(ctx context.Context, c podvm.ExecConfig, stdio agent.IO) (int32, error)
	attach func(ctx context.Context, stdio agent.IO) error
}

func (f *fakePods) id(n int) string { return fmt.Sprintf("%02x%s", n, strings.Repeat("ab", 31)) }

func (f *fakePods) Run(_ context.Context, c podvm.PodConfig) (Pod, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.pods {
		if p.status.Config.UID == c.UID && p.status.Config.Attempt == c.Attempt {
			return p, nil
		}
	}
	p := &fakePod{all: f, status: podvm.PodStatus{
		ID: f.id(len(f.pods) + 1), Config: c, State: podvm.Ready, Created: time.Now(), IPs: []string{"10.1.2.3", "fd00::3"},
		Driver: "fake", Guest: "0123456789abcdef", Agent: "1.0", Phases: []podvm.Phase{{Name: "boot", Took: 1500 * time.Microsecond}},
	}}
	p.status.VMM.PID = 4242
	f.pods = append(f.pods, p)
	f.send(podvm.Event{Kind: podvm.EventCreated, Pod: p.status, Time: time.Now()})
	return p, nil
}

func (f *fakePods) Pod(id string) (Pod, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.pods {
		if strings.HasPrefix(p.status.ID, id) {
			return p, nil
		}
	}
	return nil, fmt.Errorf("pod %s: %w", id, errdefs.ErrNotFound)
}

func (f *fakePods) Container(id string) (Container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.containers {
		if strings.HasPrefix(c.status.ID, id) {
			return c, nil
		}
	}
	return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
}

func (f *fakePods) Pods() []Pod {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []Pod
	for _, p := range f.pods {
		all = append(all, p)
	}
	return all
}

func (f *fakePods) Containers() []Container {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []Container
	for _, c := range f.containers {
		all = append(all, c)
	}
	return all
}

func (f *fakePods) Events(context.Context) <-chan podvm.Event {
	f.mu.Lock()
	defer f.mu.Unlock()
	ch := make(chan podvm.Event, 16)
	f.readers = append(f.readers, ch)
	return ch
}

func (f *fakePods) send(e podvm.Event) {
	for _, r := range f.readers {
		r <- e
	}
}

func (p *fakePod) Status() podvm.PodStatus {
	p.all.mu.Lock()
	defer p.all.mu.Unlock()
	return p.status
}

func (p *fakePod) Create(_ context.Context, config podvm.ContainerConfig) (Container, error) {
	p.all.mu.Lock()
	defer p.all.mu.Unlock()
	if p.refusal != nil {
		return nil, p.refusal
	}
	c := &fakeContainer{all: p.all, status: podvm.ContainerStatus{
		ID: p.all.id(0xc0 + len(p.all.containers)), Pod: p.status.ID, Config: config, State: podvm.Created, Created: time.Now(),
		LogPath: filepath.Join(p.status.Config.LogDir, config.LogPath), ImageRef: busyboxDigest,
		User: &podvm.ResolvedUser{UID: 1000, GID: 1000, SupplementalGroups: []int64{1000}},
	}}
	p.all.containers = append(p.all.containers, c)
	p.all.send(podvm.Event{Kind: podvm.EventCreated, Pod: p.status, Container: c.status, Time: time.Now()})
	return c, nil
}

func (p *fakePod) Stop(context.Context) error {
	p.all.mu.Lock()
	defer p.all.mu.Unlock()
	p.status.State = podvm.NotReady
	return nil
}

func (p *fakePod) Remove(context.Context) error {
	p.all.mu.Lock()
	defer p.all.mu.Unlock()
	p.all.pods = slices.DeleteFunc(p.all.pods, func(o *fakePod) bool { return o == p })
	return nil
}

func (p *fakePod) Update(_ context.Context, _, r *podvm.Resources) error {
	p.all.mu.Lock()
	defer p.all.mu.Unlock()
	p.updates = append(p.updates, r)
	return nil
}

func (p *fakePod) Stats(ctx context.Context) (podvm.PodStats, error) {
	if p.stats == nil {
		return podvm.PodStats{}, nil
	}
	return p.stats(ctx)
}

// PortForward answers with the port and then echoes.
func (p *fakePod) PortForward(ctx context.Context, port uint16, stream io.ReadWriteCloser) error {
	if p.forward != nil {
		return p.forward(ctx, stream)
	}
	if port == 1 {
		return fmt.Errorf("connect to port 1 in the pod: connection refused: %w", errdefs.ErrUnavailable)
	}
	if port == 2 {
		panic("port 2")
	}
	fmt.Fprintf(stream, "port %d\n", port)
	_, err := io.Copy(stream, stream)
	return err
}

func (c *fakeContainer) Status() podvm.ContainerStatus {
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	return c.status
}

func (c *fakeContainer) Start(context.Context) error {
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	if c.status.State != podvm.Created {
		return fmt.Errorf("container is %s: %w", c.status.State, errdefs.ErrFailedPrecondition)
	}
	c.status.State, c.status.Started = podvm.Running, time.Now()
	return nil
}

func (c *fakeContainer) Stop(context.Context, time.Duration) error {
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	c.status.State, c.status.Finished, c.status.ExitCode = podvm.Exited, time.Now(), 143
	c.status.Reason = "Error"
	return nil
}

func (c *fakeContainer) Remove(context.Context) error {
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	c.all.containers = slices.DeleteFunc(c.all.containers, func(o *fakeContainer) bool { return o == c })
	return nil
}

func (c *fakeContainer) Update(_ context.Context, r podvm.Resources) error {
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	c.status.Config.Resources = r
	return nil
}

func (c *fakeContainer) Exec(ctx context.Context, config podvm.ExecConfig, stdio agent.IO) (int32, error) {
	return c.exec(ctx, config, stdio)
}

func (c *fakeContainer) Attach(ctx context.Context, stdio agent.IO) error {
	return c.attach(ctx, stdio)
}

func (c *fakeContainer) ReopenLog(context.Context) error { return nil }

// fakeImages holds images by their names and ids.
type fakeImages struct {
	mu     sync.Mutex
	images []imagestore.Image
	err    error // of Pull
	auth   *imagestore.Auth
}

const (
	busyboxID     = "sha256:1111111111111111111111111111111111111111111111111111111111111111"
	busyboxDigest = "docker.io/library/busybox@sha256:22"
)

func newFakeImages() *fakeImages {
	busybox := imagestore.Image{
		ID: busyboxID, Tags: []string{"docker.io/library/busybox:1"}, Digests: []string{busyboxDigest}, Size: 4096, Pinned: true,
	}
	busybox.Config.Config = ocispec.ImageConfig{User: "1000:1000", StopSignal: "SIGQUIT"}
	return &fakeImages{images: []imagestore.Image{busybox}}
}

func (f *fakeImages) Pull(_ context.Context, ref string, auth *imagestore.Auth) (imagestore.Image, error) {
	f.mu.Lock()
	f.auth = auth
	err := f.err
	f.mu.Unlock()
	if err != nil {
		return imagestore.Image{}, err
	}
	return f.Image(ref)
}

func (f *fakeImages) Image(ref string) (imagestore.Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, i := range f.images {
		if i.ID == ref || slices.Contains(i.Tags, ref) {
			return i, nil
		}
	}
	return imagestore.Image{}, fmt.Errorf("image %s: %w", ref, errdefs.ErrNotFound)
}

func (f *fakeImages) Config(ref string) ([]byte, error) {
	if _, err := f.Image(ref); err != nil {
		return nil, err
	}
	return []byte("{\"config\":{\"StopSignal\":\"SIGQUIT\",\"Labels\":{\"a\":\"\xff\"}},\"history\":[{\"created_by\":\"me\"}]}"), nil
}

func (f *fakeImages) Images() []imagestore.Image {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.images)
}

func (f *fakeImages) Remove(_ context.Context, ref string) error {
	i, err := f.Image(ref)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.images = slices.DeleteFunc(f.images, func(o imagestore.Image) bool { return o.ID == i.ID })
	return nil
}

func (f *fakeImages) Usage() (imagestore.Usage, error) {
	return imagestore.Usage{Path: "/images", Bytes: 4096, Inodes: 2}, nil
}

// logs collects what is logged.
type logs struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// daemon is a server under test, and a connection to it.
type daemon struct {
	pods   *fakePods
	images *fakeImages
	socket string
	conn   *grpc.ClientConn
	log    *logs
}

func start(t *testing.T, change ...func(*Options)) *daemon {
	t.Helper()
	d := &daemon{pods: &fakePods{}, images: newFakeImages(), socket: filepath.Join(t.TempDir(), "cri.sock"), log: &logs{}}
	o := Options{
		Pods: d.pods, Images: d.images, Root: t.TempDir(), Version: "1.2.3", CgroupDriver: "systemd",
		Log: slog.New(slog.NewTextHandler(d.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	for _, f := range change {
		f(&o)
	}
	serve(t, o, d.socket)
	d.conn = dial(t, d.socket)
	return d
}

func serve(t *testing.T, o Options, socket string) {
	t.Helper()
	s, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

func dial(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///cri",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}
