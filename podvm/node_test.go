package podvm

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caisson-vm/caisson/imagestore"
	"github.com/caisson-vm/caisson/network"
	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/vmmtest"
)

const (
	testImage  = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	testDigest = "docker.io/library/web@sha256:abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789"
)

// node is a node whose VMs, network and images are fakes; its daemon may come and go.
type node struct {
	t       *testing.T
	dir     string
	driver  *vmmtest.Fake
	network *fakeNetwork
	images  *fakeImages
	shares  *fakeShares
	// templates, if set before start, and starts are options.
	templates Templates
	starts    Observer
	// learner, if set before start, is the driver.
	learner *learner
	*Manager

	mu     sync.Mutex
	agents map[string]*fakeAgent // by pod
	warm   int
	// patience, if set before start, is how long clones may take to answer.
	patience time.Duration
	// watchdog is Options.Watchdog.
	watchdog time.Duration
	// guest is the version of the guest.
	guest string
	born  func(a *fakeAgent) // called with each agent before its first stream is answered
}

func newNode(t *testing.T) *node {
	n := &node{t: t, dir: t.TempDir(), network: &fakeNetwork{}, images: &fakeImages{}, shares: &fakeShares{}, agents: map[string]*fakeAgent{}}
	n.driver = &vmmtest.Fake{Serve: func(v *vmmtest.FakeVM, c net.Conn) { n.agentOf(v.ID()).serve(c) }}
	n.images.file = filepath.Join(n.dir, "image.erofs")
	if err := os.WriteFile(n.images.file, []byte("image"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.start()
	t.Cleanup(func() { n.Close() })
	return n
}

// start starts the daemon.
func (n *node) start() {
	n.t.Helper()
	n.open()
	if err := n.Recover(soon(n.t)); err != nil {
		n.t.Fatal(err)
	}
	n.pool.quiet = time.Millisecond
	if n.patience > 0 {
		n.Manager.patience = n.patience
	}
	n.Warm()
}

// open makes a daemon that has not looked for its pods yet.
func (n *node) open() {
	n.t.Helper()
	root := filepath.Join(n.dir, "root")
	if err := os.MkdirAll(root, 0o700); err != nil {
		n.t.Fatal(err)
	}
	scratch, err := NewScratch(root, 16<<20)
	if err != nil {
		n.t.Fatal(err)
	}
	driver := vmm.Driver(n.driver)
	if n.learner != nil {
		driver = n.learner
	}
	m, err := New(Options{
		Root: root, State: filepath.Join(n.dir, "run"),
		Driver: driver, Drivers: map[string]vmm.Driver{driver.Name(): driver},
		Guest: guestimage.Files{Kernel: "vmlinux", Initrd: "initrd", Version: n.guest}, Network: n.network, Images: n.images, Shares: n.shares,
		Size: vmm.Size{CPUs: 1, Memory: 256 << 20}, Max: vmm.Size{CPUs: 4, Memory: 4<<30 + 5<<20}, MaxClone: vmm.Size{CPUs: 4, Memory: 2 << 30}, Scratch: scratch, DAX: true, Templates: n.templates, Observer: n.starts, Warm: n.warm,
		Watchdog: n.watchdog,
	})
	if err != nil {
		n.t.Fatal(err)
	}
	n.Manager = m
}

// restart ends the daemon, lets something happen, and starts it again.
func (n *node) restart(meanwhile func()) {
	n.t.Helper()
	if err := n.Close(); err != nil {
		n.t.Fatal(err)
	}
	if meanwhile != nil {
		meanwhile()
	}
	n.start()
}

func (n *node) agentOf(pod string) *fakeAgent {
	n.mu.Lock()
	defer n.mu.Unlock()
	a := n.agents[pod]
	if a == nil {
		a = newFakeAgent()
		if n.born != nil {
			n.born(a)
		}
		n.agents[pod] = a
	}
	return a
}

func podConfig(name string) PodConfig {
	return PodConfig{Name: name, Namespace: "default", UID: "uid-" + name, DNS: DNS{Servers: []string{"10.0.0.10"}}}
}

func (n *node) pod(c PodConfig) *Pod {
	n.t.Helper()
	p, err := n.Run(soon(n.t), c)
	if err != nil {
		n.t.Fatal(err)
	}
	return p
}

func containerConfig(name string) ContainerConfig {
	return ContainerConfig{Name: name, Image: testImage, ImageName: "web:1", Command: []string{"run"}, LogPath: name + ".log"}
}

func (n *node) container(p *Pod, c ContainerConfig) *Container {
	n.t.Helper()
	made, err := p.Create(soon(n.t), c)
	if err != nil {
		n.t.Fatal(err)
	}
	return made
}

func (n *node) running(p *Pod, c ContainerConfig) *Container {
	n.t.Helper()
	made := n.container(p, c)
	if err := made.Start(soon(n.t)); err != nil {
		n.t.Fatal(err)
	}
	return made
}

// until waits for a condition; it is looked at often, because not all that happens is told.
func (n *node) until(what string, ok func() bool) {
	n.t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("not within 10 s: %s", what)
		}
	}
}

// nothingLeft fails where anything of a pod is there.
func (n *node) nothingLeft() {
	n.t.Helper()
	n.until("no VM is left", func() bool { return len(n.driver.VMs()) == 0 })
	if up := n.network.pods(); len(up) > 0 {
		n.t.Errorf("networks are left: %q", up)
	}
	for _, dir := range []string{filepath.Join(n.dir, "root", "pods"), filepath.Join(n.dir, "run")} {
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) > 0 {
			n.t.Errorf("%s has %v, %v", dir, entries, err)
		}
	}
	if len(n.Pods())+len(n.Containers()) > 0 {
		n.t.Errorf("there are %d pods and %d containers", len(n.Pods()), len(n.Containers()))
	}
}

// fakeNetwork gives pods a card whose tap is a pipe.
type fakeNetwork struct {
	mu   sync.Mutex
	up   map[string]bool
	fail map[string]error
	hook func() // called by Setup
}

func (f *fakeNetwork) failing(method string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = map[string]error{method: err}
}

func (f *fakeNetwork) pods() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Keys(f.up))
}

func (f *fakeNetwork) Setup(_ context.Context, p network.Pod) (*network.Attachment, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.up == nil {
		f.up = map[string]bool{}
	}
	f.up[p.ID] = true // as a plugin that fails half-way
	if f.hook != nil {
		f.hook()
	}
	if err := f.fail["Setup"]; err != nil {
		return nil, err
	}
	sysctls := map[string]string{"net.core.somaxconn": "512", "net.ipv4.ip_forward": "1"}
	return &network.Attachment{NetNS: "/run/netns/" + p.ID, Sysctls: sysctls, Interfaces: []network.Interface{{
		Name: "eth0", Tap: "tap0", MAC: "02:00:00:00:00:01", MTU: 1450, Addresses: []string{"10.1.2.3/24", "fd00::3/64"},
		Routes: []network.Route{{Destination: "0.0.0.0/0", Gateway: "10.1.2.1", MTU: 1400, AdvMSS: 1300}}, Neighbours: []network.Neighbour{{Address: "10.1.2.1", MAC: "02:00:00:00:00:02"}},
	}, {Name: "net1", Tap: "tap1", MAC: "02:00:00:00:00:03"}}}, nil
}

func (f *fakeNetwork) Teardown(_ context.Context, p network.Pod) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.fail["Teardown"]; err != nil {
		return err
	}
	delete(f.up, p.ID)
	return nil
}

func (f *fakeNetwork) Open(id string) (*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.up == nil {
		f.up = map[string]bool{}
	}
	f.up[id] = true
	if err := f.fail["Open"]; err != nil {
		return nil, err
	}
	return os.Open(os.DevNull)
}

func (f *fakeNetwork) OpenTap(*network.Attachment, int) (*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.fail["OpenTap"]; err != nil {
		return nil, err
	}
	return os.Open("/dev/null")
}

func (f *fakeNetwork) GC(_ context.Context, pods []string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id := range f.up {
		if !slices.Contains(pods, id) {
			delete(f.up, id)
		}
	}
	return f.fail["GC"]
}

// fakeImages has one image, or another one with the same file.
type fakeImages struct {
	file  string
	other string
	fail  error
}

// pullAgain makes the image's file another one, of the same content.
func (f *fakeImages) pullAgain() error {
	return errors.Join(os.WriteFile(f.file+".new", []byte("image"), 0o600), os.Rename(f.file+".new", f.file))
}

func (f *fakeImages) Link(id, path string) (imagestore.Image, error) {
	i, err := f.Image(id)
	if err != nil {
		return i, err
	}
	err = os.Link(f.file, path)
	if os.IsExist(err) {
		ours, err1 := os.Stat(f.file)
		there, err2 := os.Stat(path)
		if err1 == nil && err2 == nil && os.SameFile(ours, there) {
			return i, nil
		}
		err = fmt.Errorf("link %s: %w", path, errdefs.ErrAlreadyExists)
	}
	return i, err
}

func (f *fakeImages) Image(id string) (imagestore.Image, error) {
	if f.fail != nil {
		return imagestore.Image{}, f.fail
	}
	if id != testImage && id != f.other {
		return imagestore.Image{}, fmt.Errorf("image %s: %w", id, errdefs.ErrNotFound)
	}
	var i imagestore.Image
	i.ID, i.Digests = id, []string{"a.example/mirror@sha256:" + strings.Repeat("9", 64), testDigest}
	i.Config.Config = ocispec.ImageConfig{User: "nobody", StopSignal: "SIGUSR1", Env: []string{"A=b"}}
	return i, nil
}
