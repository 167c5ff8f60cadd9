package podvm

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// TestLife is one pod from its start to its removal.
func TestLife(t *testing.T) {
	n := newNode(t)
	events := n.Events(soon(t))
	config := podConfig("web")
	config.LogDir = filepath.Join(n.dir, "logs")
	config.Sysctls = map[string]string{"net.ipv4.ip_forward": "0"}
	p := n.pod(config)
	s := p.Status()
	if s.State != Ready || len(s.IPs) != 2 || s.IPs[0] != "10.1.2.3" || s.Driver != "fake" || strings.Contains(s.Kernel, "\x1b") || len(s.Phases) == 0 {
		t.Errorf("got %+v", s)
	}
	a := n.agentOf(p.ID())
	if a.setup.PodId != p.ID() || a.setup.Hostname != p.ID()[:12] || len(a.setup.Entropy) < 32 || len(a.setup.MachineId) != 32 || a.setup.ScratchAddr != "serial:scratch" || a.setup.Dns.Servers[0] != "10.0.0.10" {
		t.Errorf("the guest was set up as %v", a.setup)
	}
	if nic := a.network.Interfaces[0]; nic.Name != "eth0" || nic.Mtu != 1450 || len(nic.Addresses) != 2 || len(nic.Routes) != 1 || nic.Routes[0].Mtu != 1400 || nic.Routes[0].Advmss != 1300 || len(nic.Neighbours) != 1 {
		t.Errorf("the guest's network is %v", a.network)
	}
	if want := map[string]string{"net.core.somaxconn": "512", "net.ipv4.ip_forward": "0"}; !maps.Equal(a.network.Sysctls, want) {
		t.Errorf("sysctls %v, want %v: the network's, and the pod's before them", a.network.Sysctls, want)
	}
	c := n.container(p, containerConfig("main"))
	if s := c.Status(); s.State != Created || s.ImageRef != testDigest || s.User == nil || s.User.UID != 1 {
		t.Errorf("got %+v", s)
	}
	if err := c.Start(soon(t)); err != nil {
		t.Fatal(err)
	}
	if s := c.Status(); s.State != Running || s.PID != 7 || s.Started.IsZero() {
		t.Errorf("got %+v", s)
	}
	if err := c.Start(soon(t)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a second start: %v", err)
	}
	var out bytes.Buffer
	code, err := c.Exec(soon(t), ExecConfig{Command: []string{"ls"}}, agent.IO{Stdout: &out})
	if err != nil || code != 3 || !strings.Contains(out.String(), `"ls"`) {
		t.Errorf("exec: %d, %v, %s", code, err, out.String())
	}
	a.say(c.ID(), "hello")
	a.exit(c.ID(), 5)
	n.until("exit", func() bool { return c.Status().State == Exited })
	if s := c.Status(); s.ExitCode != 5 || s.Reason != "Error" || s.Finished.IsZero() {
		t.Errorf("got %+v", s)
	}
	log, err := os.ReadFile(c.Status().LogPath)
	if err != nil || !strings.HasSuffix(string(log), " stdout F hello\n") {
		t.Errorf("when the end shows the log is %q, %v", log, err)
	}
	if err := c.Remove(soon(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Container(c.ID()); !errdefs.IsNotFound(err) || a.container(c.ID()) != nil {
		t.Errorf("a removed container is there: %v", err)
	}
	if err := p.Remove(soon(t)); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
	var kinds []string
	for e := range events {
		kind := "pod " + string(e.Kind)
		if e.Container.ID != "" {
			kind = "container " + string(e.Kind)
		}
		if kinds = append(kinds, kind); kind == "pod deleted" {
			break
		}
	}
	want := "pod created, pod started, container created, container started, container stopped, container deleted, pod stopped, pod deleted"
	if got := strings.Join(kinds, ", "); got != want {
		t.Errorf("events: %s\nwant: %s", got, want)
	}
}

var errInjected = errors.New("injected")

// TestRunUndone lets each step of a start fail.
func TestRunUndone(t *testing.T) {
	failing := func(method string) func(*node) {
		return func(n *node) { n.born = func(a *fakeAgent) { a.fail[method] = errInjected } }
	}
	for name, c := range map[string]struct {
		inject func(n *node)
		heal   func(n *node)
		step   string
	}{
		"netns":     {func(n *node) { n.network.failing("Open", errInjected) }, nil, "netns"},
		"network":   {func(n *node) { n.network.failing("Setup", errInjected) }, nil, "network"},
		"tap":       {func(n *node) { n.network.failing("OpenTap", errInjected) }, nil, "nic"},
		"launch":    {func(n *node) { n.driver.Fail("Launch", errInjected) }, func(n *node) { n.driver.Fail("Launch", nil) }, "vm"},
		"nic":       {func(n *node) { n.driver.Fail("AddNIC", errInjected) }, func(n *node) { n.driver.Fail("AddNIC", nil) }, "nic"},
		"dial":      {func(n *node) { n.driver.Fail("Dial", errInjected) }, func(n *node) { n.driver.Fail("Dial", nil) }, "guest"},
		"setup":     {failing("Setup"), nil, "setup"},
		"addresses": {failing("Network"), nil, "addresses"},
		"size":      {func(n *node) { n.driver.Fail("Resize", errInjected) }, func(n *node) { n.driver.Fail("Resize", nil) }, "size"},
		"record": {func(n *node) {
			n.born = func(a *fakeAgent) {
				a.before["Network"] = func() { os.RemoveAll(n.layout.pods()) }
			}
		}, func(n *node) { os.Mkdir(n.layout.pods(), 0o700) }, "record"},
		"folder": {func(n *node) { os.Remove(n.layout.pods()) }, func(n *node) { os.Mkdir(n.layout.pods(), 0o700) }, "pod folder"},
		"log folder": {func(n *node) { os.WriteFile(filepath.Join(n.dir, "logs"), nil, 0o600) },
			func(n *node) { os.Remove(filepath.Join(n.dir, "logs")) }, "log folder"},
		"scratch": {func(n *node) {
			n.pod(podConfig("first")).Remove(context.Background())
			os.Rename(filepath.Join(n.dir, "root", "scratch.template"), filepath.Join(n.dir, "away"))
		}, func(n *node) {
			os.Rename(filepath.Join(n.dir, "away"), filepath.Join(n.dir, "root", "scratch.template"))
		}, "scratch"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			c.inject(n)
			config := podConfig("web")
			config.LogDir = filepath.Join(n.dir, "logs")
			config.Resources = &Resources{Memory: 1 << 30}
			_, err := n.Run(soon(t), config)
			if err == nil || !strings.Contains(err.Error(), c.step) || !strings.Contains(err.Error(), "default/web") {
				t.Errorf("the error does not name the step %q: %v", c.step, err)
			}
			if c.heal != nil {
				c.heal(n)
			}
			n.nothingLeft()
			n.network.failing("", nil)
			n.born = nil
			if p := n.pod(config); p.Status().State != Ready {
				t.Errorf("the next try gave %+v", p.Status())
			}
		})
	}
}

// TestRunWithTeardownFailing has the undoing fail, too: the pod stays, for the kubelet to remove.
func TestRunWithTeardownFailing(t *testing.T) {
	n := newNode(t)
	n.network.fail = map[string]error{"Setup": errInjected, "Teardown": errInjected}
	if _, err := n.Run(soon(t), podConfig("web")); err == nil {
		t.Fatal("started")
	}
	pods := n.Pods()
	if len(pods) != 1 || pods[0].Status().State != NotReady || pods[0].Status().Reason == "" {
		t.Fatalf("got %d pods", len(pods))
	}
	if _, err := n.Run(soon(t), podConfig("web")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("over what is left: %v", err)
	}
	n.network.failing("", nil)
	n.restart(nil)
	for _, p := range n.Pods() {
		if err := p.Remove(soon(t)); err != nil {
			t.Error(err)
		}
	}
	n.nothingLeft()
}

// TestRunJoined has one pod asked for many times, and by callers that give up.
func TestRunJoined(t *testing.T) {
	n := newNode(t)
	at, proceed := make(chan struct{}), make(chan struct{})
	n.born = func(a *fakeAgent) { a.before["Setup"] = func() { close(at); <-proceed } }
	impatient, cancel := context.WithTimeout(t.Context(), late-time.Millisecond)
	gaveUp := make(chan error, 1)
	go func() {
		_, err := n.Run(impatient, podConfig("web"))
		gaveUp <- err
	}()
	<-at
	cancel()
	if err := <-gaveUp; !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a caller that gave up got %v", err)
	}
	var got sync.Map
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			p, err := n.Run(soon(t), podConfig("web"))
			if err != nil {
				t.Error(err)
				return
			}
			got.Store(p.ID(), true)
		})
	}
	other := podConfig("web")
	other.Attempt = 1
	n.mu.Lock()
	n.born = nil
	n.mu.Unlock()
	if p := n.pod(other); p.Status().State != Ready {
		t.Error("another pod waits for the first")
	}
	close(proceed)
	callers.Wait()
	count := 0
	got.Range(func(any, any) bool { count++; return true })
	if count != 1 || len(n.driver.VMs()) != 2 {
		t.Errorf("%d pods, %d VMs", count, len(n.driver.VMs()))
	}
	p := n.pod(podConfig("web"))
	if err := p.Stop(soon(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Run(soon(t), podConfig("web")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a stopped pod was run: %v", err)
	}
}

// untilWaiting waits until so many calls wait for the start of a pod.
func (n *node) untilWaiting(c PodConfig, calls int) {
	n.t.Helper()
	n.until("the second call waits", func() bool {
		n.Manager.mu.Lock()
		defer n.Manager.mu.Unlock()
		return n.names[nameOf(c)].waiting == calls
	})
}

// asks for a pod; the channel has the answer.
func (n *node) asks(ctx context.Context, c PodConfig) <-chan error {
	answer := make(chan error, 1)
	go func() {
		_, err := n.Run(ctx, c)
		answer <- err
	}()
	return answer
}

// TestRunCancelled: a start that all its callers have cancelled is given up, and nothing is left of it; with one
// that waits it goes on.
func TestRunCancelled(t *testing.T) {
	for _, waits := range []bool{false, true} {
		n := newNode(t)
		at, proceed := make(chan struct{}), make(chan struct{})
		n.born = func(a *fakeAgent) { a.before["Setup"] = func() { close(at); <-proceed } }
		ctx, cancel := context.WithCancel(t.Context())
		ended := n.asks(ctx, podConfig("web"))
		<-at
		var joined <-chan error
		if waits {
			joined = n.asks(soon(t), podConfig("web"))
			n.untilWaiting(podConfig("web"), 2)
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the call that was cancelled: %v", err)
		}
		if !waits {
			n.until("the start is undone", func() bool {
				n.Manager.mu.Lock()
				defer n.Manager.mu.Unlock()
				return len(n.names) == 0
			})
			n.nothingLeft()
		}
		close(proceed)
		if waits {
			if err := <-joined; err != nil {
				t.Errorf("the call that waits: %v", err)
			}
		}
	}
}

// TestRunAfterCancelled: who asks for a pod while a start of it is taken back, that others have given up, gets
// another one.
func TestRunAfterCancelled(t *testing.T) {
	n := newNode(t)
	at, proceed := make(chan struct{}), make(chan struct{})
	n.network.mu.Lock()
	n.network.hook = sync.OnceFunc(func() { close(at); <-proceed })
	n.network.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	ended := n.asks(ctx, podConfig("web"))
	<-at
	cancel()
	<-ended
	joined := n.asks(soon(t), podConfig("web"))
	n.untilWaiting(podConfig("web"), 1)
	close(proceed)
	if err := <-joined; err != nil {
		t.Error(err)
	}
}

func TestRunRefusesNodePods(t *testing.T) {
	n := newNode(t)
	for _, c := range []PodConfig{{HostNetwork: true}, {HostPID: true}, {HostIPC: true}} {
		if _, err := n.Run(soon(t), c); !errdefs.IsNotImplemented(err) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	n.nothingLeft()
}

func TestFindByPrefix(t *testing.T) {
	n := newNode(t)
	a, b := n.pod(podConfig("a")), n.pod(podConfig("b"))
	if p, err := n.Pod(a.ID()[:20]); err != nil || p != a {
		t.Errorf("got %v, %v", p, err)
	}
	if _, err := n.Pod(""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no id: %v", err)
	}
	if _, err := n.Pod("x"); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown id: %v", err)
	}
	same := 0
	for same < len(a.ID()) && a.ID()[same] == b.ID()[same] {
		same++
	}
	if same > 0 {
		if _, err := n.Pod(a.ID()[:same]); !errdefs.IsInvalidArgument(err) {
			t.Errorf("a prefix of two: %v", err)
		}
	}
}

// TestStopRemoveIdempotent stops and removes again and again, also at once.
func TestStopRemoveIdempotent(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	c := n.running(p, containerConfig("main"))
	for range 2 {
		if err := p.Stop(soon(t)); err != nil {
			t.Fatal(err)
		}
	}
	if s := c.Status(); s.State != Exited || s.ExitCode != 137 {
		t.Errorf("with its pod the container became %+v", s)
	}
	if s := p.Status(); s.State != NotReady || s.Reason != "Stopped" {
		t.Errorf("got %+v", s)
	}
	if len(n.driver.VMs()) > 0 || len(n.network.pods()) > 0 {
		t.Error("a stopped pod has a VM or a network")
	}
	if err := c.Stop(soon(t), 0); err != nil {
		t.Error(err)
	}
	if _, err := p.Create(soon(t), containerConfig("late")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a container in a stopped pod: %v", err)
	}
	if err := c.Remove(soon(t)); err != nil {
		t.Error(err)
	}
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			if err := p.Remove(soon(t)); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	n.nothingLeft()
	if q := n.pod(podConfig("web")); q.ID() == p.ID() {
		t.Error("a removed pod came back")
	}
}

func TestStopFailsAndIsTriedAgain(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	c := n.running(p, containerConfig("main"))
	n.agentOf(p.ID()).do(func() { n.agentOf(p.ID()).fail["Signal"] = errInjected })
	n.driver.Fail("Kill", errInjected)
	if err := p.Stop(soon(t)); !errors.Is(err, errInjected) || c.Status().State != Running {
		t.Errorf("got %v, and a container is %v whose VM is not known to have ended", err, c.Status().State)
	}
	n.driver.Fail("Kill", nil)
	n.network.failing("Teardown", errInjected)
	if err := p.Remove(soon(t)); !errors.Is(err, errInjected) {
		t.Errorf("got %v", err)
	}
	if s := c.Status(); s.State != Exited {
		t.Errorf("the VM has ended, and its container is %v", s.State)
	}
	if s := p.Status(); s.State != NotReady || s.Reason != stopReason {
		t.Errorf("the VM has ended, and its pod is %v, %s", s.State, s.Reason)
	}
	n.network.failing("", nil)
	if err := p.Remove(soon(t)); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
}
