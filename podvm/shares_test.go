package podvm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/share"
)

// fakeShares notes what is asked of it.
type fakeShares struct {
	mu       sync.Mutex
	err      error
	served   []share.Dir
	pods     []share.Pod
	released []string
	scores   map[string]int // by runtime folder
}

func (f *fakeShares) Share(_ context.Context, p share.Pod, d share.Dir) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.served, f.pods = append(f.served, d), append(f.pods, p)
	}
	return f.err
}

func (f *fakeShares) Resume(p share.Pod, dirs []share.Dir) {
	for _, d := range dirs {
		f.Share(context.Background(), p, d)
	}
}

func (f *fakeShares) SetOOMScore(run string, score int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.scores == nil {
		f.scores = map[string]int{}
	}
	f.scores[run] = score
	return f.err
}

func (f *fakeShares) Release(_ context.Context, run string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.released = append(f.released, run)
	return nil
}

// last is the directory that was served last.
func (f *fakeShares) last(t *testing.T) share.Dir {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.served) == 0 {
		t.Fatal("nothing is served")
	}
	return f.served[len(f.served)-1]
}

// mounted makes a container with the mount and returns how the guest was asked for it.
func (n *node) mounted(p *Pod, name string, m Mount) *agent.Mount {
	n.t.Helper()
	config := containerConfig(name)
	config.Mounts = []Mount{m}
	c := n.container(p, config)
	a := n.agentOf(p.ID())
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.containers[c.ID()].request.Mounts[0]
}

func resolved(t *testing.T) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestHostDirectory(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	plain, covered := resolved(t), resolved(t)
	below := filepath.Join(covered, "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", below, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(below, unix.MNT_DETACH) })
	link := filepath.Join(resolved(t), "link")
	if err := os.Symlink(plain, link); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(resolved(t), "a", "b")
	for name, c := range map[string]struct {
		mount Mount
		want  share.Dir
		ro    bool // the guest's own mount
	}{
		"plain":            {Mount{HostPath: plain}, share.Dir{Path: plain}, false},
		"link":             {Mount{HostPath: link}, share.Dir{Path: plain}, false},
		"missing":          {Mount{HostPath: missing}, share.Dir{Path: missing}, false},
		"read-only":        {Mount{HostPath: plain, ReadOnly: true}, share.Dir{Path: plain, ReadOnly: true, Recursive: true}, true},
		"follows":          {Mount{HostPath: plain, Propagation: "rslave"}, share.Dir{Path: plain, Follow: true}, false},
		"ro, follows":      {Mount{HostPath: plain, ReadOnly: true, Propagation: "rslave"}, share.Dir{Path: plain, ReadOnly: true, Follow: true}, false},
		"ro, mounts below": {Mount{HostPath: covered, ReadOnly: true}, share.Dir{Path: covered, ReadOnly: true}, false},
		"recursive":        {Mount{HostPath: covered, ReadOnly: true, RecursiveReadOnly: true}, share.Dir{Path: covered, ReadOnly: true, Recursive: true}, true},
	} {
		c.mount.ContainerPath = "/m"
		asked := n.mounted(p, name, c.mount)
		got := n.shares.last(t)
		if asked.GetShare().GetTag() != got.Tag || got.Tag == "" {
			t.Errorf("%s: the guest is asked for %v, served is %q", name, asked, got.Tag)
		}
		if got.Tag = ""; got != c.want {
			t.Errorf("%s: served is %+v, want %+v", name, got, c.want)
		}
		if ro := slices.Contains(asked.Options, "ro") || slices.Contains(asked.Options, "rro"); ro != c.ro {
			t.Errorf("%s: the guest's mount is read-only: %v, %v", name, ro, asked.Options)
		}
	}
	if info, err := os.Stat(missing); err != nil || !info.IsDir() {
		t.Errorf("the directory that was missing: %v", err)
	}
	if got := n.shares.pods[0]; got.ID != p.ID() || got.Dir != p.m.layout.run(p.ID()) || got.Guest == nil {
		t.Errorf("served to %+v", got)
	}
}

// TestHostDirectoryRestart shows that a daemon which starts anew serves again, once each, and releases at
// the pod's end.
func TestHostDirectoryRestart(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	dir := resolved(t)
	n.mounted(p, "a", Mount{HostPath: dir, ContainerPath: "/m"})
	n.mounted(p, "b", Mount{HostPath: dir, ContainerPath: "/other"})
	want := n.shares.last(t)
	n.restart(func() { n.shares.served, n.shares.released = nil, nil })
	if got := n.shares.served; len(got) != 1 || got[0] != want {
		t.Errorf("served again: %+v, want %+v once", got, want)
	}
	if len(n.shares.released) != 0 {
		t.Error("released by a restart")
	}
	run := p.m.layout.run(p.ID())
	again, err := n.Pod(p.ID())
	if err == nil {
		err = again.Stop(soon(t))
	}
	if err != nil || !slices.Contains(n.shares.released, run) {
		t.Errorf("stopped: %v; released %v", err, n.shares.released)
	}
}

func TestHostDirectoryNotServed(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	n.shares.err = errors.New("no room")
	config := containerConfig("main")
	config.Mounts = []Mount{{HostPath: resolved(t), ContainerPath: "/m"}}
	if _, err := p.Create(soon(t), config); !errors.Is(err, n.shares.err) {
		t.Errorf("got %v", err)
	}
	if len(p.Containers()) != 0 {
		t.Error("there is a container")
	}
}

// TestNodeEmptyDirs: emptyDirs are where they were when the pod started, whatever the daemon is told meanwhile, and
// in memory the guest's.
func TestNodeEmptyDirs(t *testing.T) {
	n := newNode(t)
	root := filepath.Join(resolved(t), "pods", "uid", "volumes", "kubernetes.io~empty-dir")
	disk, memory := filepath.Join(root, "disk"), filepath.Join(root, "memory")
	if err := errors.Join(os.MkdirAll(disk, 0o755), os.MkdirAll(memory, 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", memory, "tmpfs", 0, "size=1M"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(memory, unix.MNT_DETACH) })
	before := n.pod(podConfig("before"))
	n.Manager.o.NodeEmptyDirs = true
	after := n.pod(podConfig("after"))
	for _, p := range []*Pod{before, after} {
		got := n.mounted(p, "disk", Mount{HostPath: disk, ContainerPath: "/m"})
		if onNode := got.GetShare() != nil; onNode != (p == after) {
			t.Errorf("pod %s is asked for %v", p.record.now().Config.Name, got)
		}
		if got := n.mounted(p, "memory", Mount{HostPath: memory, ContainerPath: "/m"}); !got.GetEmptyDir().GetMemory() {
			t.Errorf("in memory, pod %s is asked for %v", p.record.now().Config.Name, got)
		}
	}
	if got := n.shares.last(t).Path; got != disk {
		t.Errorf("%s is served", got)
	}
}

// TestEmptyDirSubPath mounts parts of emptyDirs as the kubelet does: a bind mount of the node's folder, in
// which the files are not.
func TestEmptyDirSubPath(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	pod := filepath.Join(resolved(t), "pods", "uid")
	bind := func(from, volume string) string {
		at := filepath.Join(pod, "volume-subpaths", volume, "main", "0")
		if err := errors.Join(os.MkdirAll(from, 0o755), os.MkdirAll(at, 0o755)); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(from, at, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
		return at
	}
	disk := filepath.Join(pod, "volumes", "kubernetes.io~empty-dir", "disk")
	memory := filepath.Join(pod, "volumes", "kubernetes.io~empty-dir", "memory")
	claim := filepath.Join(pod, "volumes", "kubernetes.io~csi", "claim", "mount")
	if err := os.MkdirAll(memory, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", memory, "tmpfs", 0, "size=1M"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(memory, unix.MNT_DETACH) })

	for _, name := range []string{"disk", "memory"} {
		from := map[string]string{"disk": disk, "memory": memory}[name]
		got := n.mounted(p, name, Mount{HostPath: bind(filepath.Join(from, "a", "b"), name), ContainerPath: "/m"}).GetEmptyDir()
		if got.GetName() != name || got.GetSubPath() != "a/b" || got.GetMemory() != (name == "memory") {
			t.Errorf("part of the emptyDir %s: the guest is asked for %v", name, got)
		}
	}
	at := bind(filepath.Join(claim, "sub"), "claim")
	if n.mounted(p, "claim", Mount{HostPath: at, ContainerPath: "/m"}).GetShare() == nil || n.shares.last(t).Path != at {
		t.Error("part of a claim is not served")
	}
	stray := bind(filepath.Join(pod, "elsewhere"), "disk")
	config := containerConfig("stray")
	config.Mounts = []Mount{{HostPath: stray, ContainerPath: "/m"}}
	if _, err := p.Create(soon(t), config); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("what is no part of the emptyDir of that name: %v", err)
	}
}
