package podvm

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/caisson-vm/caisson/podvm/state"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// TestCreateUndone lets each step of a creation fail, and then succeed.
func TestCreateUndone(t *testing.T) {
	for name, c := range map[string]struct {
		inject func(n *node, a *fakeAgent, c *ContainerConfig)
		heal   func(n *node, a *fakeAgent)
		want   string
	}{
		"image": {func(n *node, _ *fakeAgent, _ *ContainerConfig) { n.images.fail = errInjected }, func(n *node, _ *fakeAgent) { n.images.fail = nil }, "image"},
		"unknown image": {func(_ *node, _ *fakeAgent, c *ContainerConfig) {
			c.Image = "sha256:" + strings.Repeat("f", 64)
		}, nil, "image"},
		"disk": {func(n *node, _ *fakeAgent, _ *ContainerConfig) { n.driver.Fail("AddDisk", errInjected) }, func(n *node, _ *fakeAgent) { n.driver.Fail("AddDisk", nil) }, "injected"},
		"size": {func(n *node, _ *fakeAgent, _ *ContainerConfig) { n.driver.Fail("Resize", errInjected) }, func(n *node, _ *fakeAgent) { n.driver.Fail("Resize", nil) }, "injected"},
		"agent": {func(_ *node, a *fakeAgent, _ *ContainerConfig) { a.do(func() { a.fail["Create"] = errInjected }) },
			func(_ *node, a *fakeAgent) { a.do(func() { a.fail["Create"] = nil }) }, "injected"},
		"command": {func(_ *node, _ *fakeAgent, c *ContainerConfig) { c.Command = nil }, nil, "no command"},
		"mount": {func(_ *node, _ *fakeAgent, c *ContainerConfig) {
			c.Mounts = []Mount{{HostPath: "relative", ContainerPath: "/m"}}
		}, nil, "/m"},
		"device": {func(_ *node, _ *fakeAgent, c *ContainerConfig) {
			c.Devices = []Device{{HostPath: "/dev/ptmx", ContainerPath: "/dev/x"}}
		}, nil, "/dev/ptmx"},
		"log": {func(n *node, _ *fakeAgent, c *ContainerConfig) {
			os.Mkdir(filepath.Join(n.dir, "logs", "main.log"), 0o700)
		}, func(n *node, _ *fakeAgent) { os.Remove(filepath.Join(n.dir, "logs", "main.log")) }, "log"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			pod := podConfig("web")
			pod.LogDir = filepath.Join(n.dir, "logs")
			p := n.pod(pod)
			a := n.agentOf(p.ID())
			config := containerConfig("main")
			config.Resources.Memory = 512 << 20
			c.inject(n, a, &config)
			_, err := p.Create(soon(t), config)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "main") {
				t.Errorf("got %v, want something with %q", err, c.want)
			}
			entries, err := os.ReadDir(n.layout.containers(p.ID()))
			if err != nil || len(entries) > 0 {
				t.Errorf("files are left: %v, %v", entries, err)
			}
			if logs, err := filepath.Glob(filepath.Join(pod.LogDir, "*")); name != "log" && len(logs) > 0 {
				t.Errorf("a log is left, which the kubelet counts as a restart: %v, %v", logs, err)
			}
			if len(p.Containers())+len(n.Containers()) > 0 || len(a.containers) > 0 {
				t.Error("a container is left")
			}
			if c.heal != nil {
				c.heal(n, a)
			}
			config = containerConfig("main")
			config.Resources.Memory = 512 << 20
			n.running(p, config)
		})
	}
}

// TestCreateJoined has a creation tried again while it goes on, and after it.
func TestCreateJoined(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	var ids sync.Map
	var callers sync.WaitGroup
	for range 5 {
		callers.Go(func() {
			c, err := p.Create(soon(t), containerConfig("main"))
			if err != nil {
				t.Error(err)
				return
			}
			ids.Store(c.ID(), c)
		})
	}
	callers.Wait()
	count := 0
	var c *Container
	ids.Range(func(_, v any) bool { count++; c = v.(*Container); return true })
	if count != 1 || len(n.agentOf(p.ID()).containers) != 1 {
		t.Fatalf("%d containers", count)
	}
	if err := c.Start(soon(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Create(soon(t), containerConfig("main")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("over one that runs: %v", err)
	}
	again := containerConfig("main")
	again.Attempt = 1
	n.running(p, again)
	disks := n.driver.VMs()[0].Disks()
	if len(disks) != 2 {
		t.Errorf("one image and the scratch disk are %d disks", len(disks))
	}
	for _, d := range disks {
		if d.Serial != ScratchDisk().Serial && (!d.ReadOnly || !d.Shared) {
			t.Errorf("the image's disk is %+v", d)
		}
	}
}

// TestLargeImages: a guest maps images as long as it has room for what it keeps of each page.
func TestLargeImages(t *testing.T) {
	n := newNode(t)
	n.images.other = "sha256:" + strings.Repeat("5", 64)
	p := n.pod(podConfig("web"))
	memory := p.machine().Info().Size.Memory
	if err := os.Truncate(n.images.file, mappedMax*memory*3/4); err != nil {
		t.Fatal(err)
	}
	n.running(p, containerConfig("main"))
	other := containerConfig("other")
	other.Image = n.images.other
	n.running(p, other)
	for _, d := range n.driver.VMs()[0].Disks() {
		if first := strings.HasPrefix(testImage, "sha256:"+d.Serial); d.Serial != ScratchDisk().Serial && d.Shared != first {
			t.Errorf("of two images of %d bytes each, in a VM of %d: %+v", mappedMax*memory*3/4, memory, d)
		}
	}
	if err := os.Truncate(n.images.file, mappedMax*memory+1); err != nil {
		t.Fatal(err)
	}
	p = n.pod(podConfig("large"))
	n.running(p, containerConfig("main"))
	if !slices.ContainsFunc(n.driver.VMs()[1].Disks(), func(d vmm.Disk) bool { return d.ReadOnly && !d.Shared }) {
		t.Error("the guest maps an image that is too large for it")
	}
}

// TestImagePulledAgain has an image removed and pulled again, while a pod has it and before.
func TestImagePulledAgain(t *testing.T) {
	for name, attached := range map[string]bool{"attached": true, "linked and not attached": false} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			p := n.pod(podConfig("web"))
			if attached {
				n.running(p, containerConfig("main"))
			} else if err := os.Link(n.images.file, n.layout.image(p.ID(), strings.TrimPrefix(testImage, "sha256:"))); err != nil {
				t.Fatal(err)
			}
			if err := n.images.pullAgain(); err != nil {
				t.Fatal(err)
			}
			again := containerConfig("main")
			again.Attempt = 1
			n.running(p, again)
			if disks := n.driver.VMs()[0].Disks(); len(disks) != 2 {
				t.Errorf("one image and the scratch disk are %d disks", len(disks))
			}
		})
	}
}

// TestCreateRequest looks at what the guest is asked for.
func TestCreateRequest(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	uid := int64(1000)
	config := containerConfig("main")
	config.Stdin, config.StdinOnce, config.TTY = true, true, true
	config.Security.User = User{UID: &uid, SupplementalGroups: []int64{5}}
	config.Security.PIDMode, config.Security.TargetContainer = "target", "abc"
	c := n.container(p, config)
	r := n.agentOf(p.ID()).container(c.ID()).request
	var spec specs.Spec
	if err := json.Unmarshal(r.Spec, &spec); err != nil {
		t.Fatal(err)
	}
	if !spec.Process.Terminal || spec.Process.Args[0] != "run" || !r.Stdin || !r.StdinOnce || r.TargetPid != "abc" || r.SharePid || r.GuestPid {
		t.Errorf("got %+v", r)
	}
	if !r.User.HasUid || r.User.Uid != 1000 || r.User.HasGid || r.User.Name != "" || r.User.SupplementalGroups[0] != 5 {
		t.Errorf("user %v", r.User)
	}
	d := n.container(p, containerConfig("other"))
	if u := n.agentOf(p.ID()).container(d.ID()).request.User; u.Name != "nobody" || u.HasUid {
		t.Errorf("the image's user is %v", u)
	}
}

// TestUpdateContainer changes limits, up and beyond what there is.
func TestUpdateContainer(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	config := containerConfig("main")
	config.Resources = Resources{Memory: 512 << 20, CPUQuota: 100_000, CPUPeriod: 100_000}
	c := n.running(p, config)
	size := func() vmm.Size { return n.driver.VMs()[0].Info().Size }
	before := size()
	if before.Memory < 512<<20 {
		t.Errorf("the VM has %d MiB for 512", before.Memory>>20)
	}
	if err := c.Update(soon(t), Resources{Memory: 1 << 30, CPUQuota: 150_000}); err != nil {
		t.Fatal(err)
	}
	if s := size(); s.Memory < 1<<30 || s.CPUs < 2 {
		t.Errorf("the VM became %+v", s)
	}
	if r := c.Status().Config.Resources; r.Memory != 1<<30 || r.CPUQuota != 150_000 || r.CPUPeriod != 100_000 {
		t.Errorf("got %+v", r)
	}
	if data := n.agentOf(p.ID()).container(c.ID()).update; !strings.Contains(string(data), "1073741824") {
		t.Errorf("the guest was told %s", data)
	}
	a := n.agentOf(p.ID())
	a.do(func() { a.fail["Update"] = errors.Join(errInjected, errdefs.ErrInvalidArgument) })
	if err := c.Update(soon(t), Resources{Memory: 2 << 30}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v", err)
	}
	if r := c.Status().Config.Resources; r.Memory != 1<<30 {
		t.Errorf("what was refused is recorded: %+v", r)
	}
	n.restart(nil)
	c, err := n.Manager.Container(c.ID())
	if err != nil || c.Status().Config.Resources.CPUQuota != 150_000 {
		t.Errorf("after a restart: %v", err)
	}
}

// TestCPUSet: the numbers of the node's CPUs do not reach the guest, and the log says so once.
func TestCPUSet(t *testing.T) {
	var log bytes.Buffer
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn})))
	defer slog.SetDefault(old)
	n := newNode(t)
	p := n.pod(podConfig("web"))
	atOnce, later := containerConfig("at-once"), containerConfig("later")
	atOnce.Resources.CPUSetCPUs = "2-3"
	for _, c := range []*Container{n.running(p, atOnce), n.running(p, later)} {
		for _, set := range []string{"4", "5"} {
			if err := c.Update(soon(t), Resources{CPUSetCPUs: set, CPUSetMems: "0", CPUShares: 512}); err != nil {
				t.Fatal(err)
			}
		}
		if data := n.agentOf(p.ID()).container(c.ID()).update; strings.Contains(string(data), "cpus") || strings.Contains(string(data), "mems") {
			t.Errorf("the guest was told %s", data)
		}
		if got := strings.Count(log.String(), c.ID()); got != 1 {
			t.Errorf("told %d times:\n%s", got, log.String())
		}
	}
}

// TestUpdatePod resizes a pod, and is refused what can't be.
func TestUpdatePod(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	if err := p.Update(soon(t), nil, &Resources{Memory: 1 << 30, CPUQuota: 300_000, CPUPeriod: 100_000}); err != nil {
		t.Fatal(err)
	}
	if s := n.driver.VMs()[0].Info().Size; s.CPUs != 3 || s.Memory < 1<<30 {
		t.Errorf("the VM became %+v", s)
	}
	n.driver.Fail("Resize", errdefs.ErrResourceExhausted)
	if err := p.Update(soon(t), nil, &Resources{Memory: 2 << 30}); !errdefs.IsResourceExhausted(err) {
		t.Errorf("got %v", err)
	}
	if r := p.Status().Config.Resources; r.Memory != 1<<30 {
		t.Errorf("what was refused is recorded: %+v", r)
	}
}

// TestRecordBehind: what a creation attached to the VM, and could not record, is recorded before the next one
// succeeds: the next daemon would take it for nobody's.
func TestRecordBehind(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	c := containerConfig("main")
	c.Mounts = []Mount{{HostPath: resolved(t), ContainerPath: "/m"}}
	path := n.layout.record(p.ID())
	block := func() error { // as a full disk does
		return errors.Join(os.Rename(path, path+".kept"), os.MkdirAll(filepath.Join(path, "x"), 0o700))
	}
	free := func() error { return errors.Join(os.RemoveAll(path), os.Rename(path+".kept", path)) }
	if err := block(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := p.Create(soon(t), c); err == nil {
			t.Fatal("a container is there of which the record knows nothing")
		}
	}
	if err := free(); err != nil {
		t.Fatal(err)
	}
	n.container(p, c)
	var r podRecord
	if err := state.Read(path, &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Disks) != 1 || len(r.Shares) != 1 {
		t.Errorf("the record has the disks %v, the directories %v", r.Disks, r.Shares)
	}
}

// TestHostileGroups: what no guest can have found is not recorded.
func TestHostileGroups(t *testing.T) {
	if err := checkGroups([]int64{0, math.MaxUint32}); err != nil {
		t.Error(err)
	}
	for _, groups := range [][]int64{{-1}, {math.MaxUint32 + 1}, make([]int64, groupsMax+1)} {
		if err := checkGroups(groups); err == nil {
			t.Errorf("%d groups, the first %d, are taken", len(groups), groups[0])
		}
	}
}
