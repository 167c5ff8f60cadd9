package podvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/state"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// again is the pod as the next daemon has it.
func (n *node) again(id string) *Pod {
	n.t.Helper()
	p, err := n.Pod(id)
	if err != nil {
		n.t.Fatal(err)
	}
	return p
}

// TestRecoverRunningPod restarts the daemon over a pod that goes on meanwhile.
func TestRecoverRunningPod(t *testing.T) {
	n := newNode(t)
	config := podConfig("web")
	config.LogDir = filepath.Join(n.dir, "logs")
	p := n.pod(config)
	ended := containerConfig("ended")
	path := terminationLog(t, n, &ended)
	e, goesOn := n.running(p, ended), n.running(p, containerConfig("goes-on"))
	created := n.container(p, containerConfig("created"))
	a := n.agentOf(p.ID())
	a.say(goesOn.ID(), "before")
	n.until("log", func() bool { data, _ := os.ReadFile(goesOn.Status().LogPath); return len(data) > 0 })
	before := p.Status()
	n.restart(func() {
		a.say(goesOn.ID(), "meanwhile")
		a.say(e.ID(), "last words")
		a.exit(e.ID(), 4, &agent.WrittenFile{Name: a.container(e.ID()).request.Mounts[0].GetFiles().Name, Content: []byte("bye")})
	})
	q := n.again(p.ID())
	if s := q.Status(); s.State != Ready || len(s.IPs) != 2 || s.Config.Name != "web" || !s.Created.Equal(before.Created) {
		t.Errorf("got %+v", s)
	}
	c, err := n.Manager.Container(e.ID())
	if err != nil {
		t.Fatal(err)
	}
	n.until("exit", func() bool { return c.Status().State == Exited })
	if s := c.Status(); s.ExitCode != 4 {
		t.Errorf("got %+v", s)
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "bye" {
		t.Errorf("the message is %q, %v", data, err)
	}
	for name, want := range map[string][]string{"goes-on": {"before", "meanwhile", "after"}, "ended": {"last words"}} {
		if name == "goes-on" {
			a.say(goesOn.ID(), "after")
		}
		log := filepath.Join(config.LogDir, name+".log")
		n.until("log of "+name, func() bool { data, _ := os.ReadFile(log); return strings.Count(string(data), "\n") == len(want) })
		data, _ := os.ReadFile(log)
		for i, line := range strings.Split(strings.TrimSpace(string(data)), "\n") {
			if !strings.HasSuffix(line, want[i]) {
				t.Errorf("%s: line %d is %q, want %q", name, i, line, want[i])
			}
		}
	}
	d, err := n.Manager.Container(created.ID())
	if err != nil || d.Status().State != Created {
		t.Fatalf("the created container: %v", err)
	}
	if err := d.Start(soon(t)); err != nil {
		t.Error(err)
	}
	if again := n.pod(config); again != q {
		t.Error("the kubelet's retry started another pod")
	}
	n.running(q, containerConfig("new"))
	if disks := n.driver.VMs()[0].Disks(); len(disks) != 2 {
		t.Errorf("the image was attached again: %d disks", len(disks))
	}
	if err := q.Remove(soon(t)); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
}

// TestRecoverOtherGuest updates the guest: pods that run keep the one that they began with, and say so.
func TestRecoverOtherGuest(t *testing.T) {
	n := newNode(t)
	n.guest = "before"
	n.restart(nil)
	p := n.pod(podConfig("web"))
	n.restart(func() { n.guest = "now" })
	n.pod(podConfig("next"))
	for _, q := range n.Pods() {
		want := "now"
		if q.ID() == p.ID() {
			want = "before"
		}
		if s := q.Status(); s.Guest != want || s.Agent != "test" {
			t.Errorf("pod %s runs the guest %q with the agent %q, want %q", s.Config.Name, s.Guest, s.Agent, want)
		}
	}
}

// TestRecoverVMGone has the VM end while no daemon runs.
func TestRecoverVMGone(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	c := n.running(p, containerConfig("main"))
	n.restart(func() { n.driver.VMs()[0].End(errors.New("gone")) })
	q := n.again(p.ID())
	if s := q.Status(); s.State != NotReady || s.Reason != "VMGone" {
		t.Errorf("got %+v", s)
	}
	d, err := n.Manager.Container(c.ID())
	if err != nil {
		t.Fatal(err)
	}
	if s := d.Status(); s.State != Exited || s.ExitCode != 255 || s.Reason != "VMGone" {
		t.Errorf("got %+v", s)
	}
	if err := d.Remove(soon(t)); err != nil {
		t.Error(err)
	}
	if err := q.Remove(soon(t)); err != nil {
		t.Error(err)
	}
	n.nothingLeft()
}

// TestRecoverHalfMade has the daemon die in the middle of a start, at several points.
func TestRecoverHalfMade(t *testing.T) {
	n := newNode(t)
	id := newID()
	for name, make := range map[string]func() error{
		"folder alone": func() error { return os.MkdirAll(n.layout.containers(id), 0o700) },
		"recorded": func() error {
			r := podRecord{ID: id, Config: podConfig("half"), Created: time.Now(), Stage: starting, Driver: "fake", VM: n.vmConfig(id)}
			return errors.Join(os.MkdirAll(n.layout.containers(id), 0o700), state.Write(n.layout.record(id), r))
		},
		"launched": func() error {
			r := podRecord{ID: id, Config: podConfig("half"), Created: time.Now(), Stage: starting, Driver: "fake", VM: n.vmConfig(id)}
			err := errors.Join(os.MkdirAll(n.layout.containers(id), 0o700), os.MkdirAll(n.layout.run(id), 0o700), state.Write(n.layout.record(id), r))
			err = errors.Join(err, os.WriteFile(r.VM.Disk.Path, nil, 0o600))
			_, launch := n.driver.Launch(soon(t), r.VM)
			n.network.up = map[string]bool{id: true}
			return errors.Join(err, launch)
		},
		"no record, but all the rest": func() error {
			err := errors.Join(os.MkdirAll(n.layout.run(id), 0o700))
			_, launch := n.driver.Launch(soon(t), vmm.Config{ID: id, Dir: n.layout.run(id)})
			n.network.up = map[string]bool{id: true}
			return errors.Join(err, launch)
		},
	} {
		n.restart(func() {
			if err := make(); err != nil {
				t.Fatal(err)
			}
		})
		if len(n.Pods()) > 0 {
			t.Errorf("%s: the pod shows", name)
		}
		n.nothingLeft()
	}
}

// TestRecoverVMMHangs has VMMs that live and answer nobody, of a pod that was ready, of one that was
// half-made, and of none: all are ended, and the first shows as not ready.
func TestRecoverVMMHangs(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	c := n.running(p, containerConfig("main"))
	half, none := newID(), newID()
	n.restart(func() {
		for _, id := range []string{half, none} {
			if err := os.Mkdir(n.layout.run(id), 0o700); err != nil {
				t.Fatal(err)
			}
			if _, err := n.driver.Launch(soon(t), vmm.Config{ID: id, Dir: n.layout.run(id)}); err != nil {
				t.Fatal(err)
			}
		}
		r := podRecord{ID: half, Config: podConfig("half"), Created: time.Now(), Stage: starting, Driver: "fake", VM: n.vmConfig(half)}
		if err := errors.Join(os.MkdirAll(n.layout.containers(half), 0o700), state.Write(n.layout.record(half), r)); err != nil {
			t.Fatal(err)
		}
		n.driver.Fail("Attach", errInjected)
	})
	n.until("the VMs are ended", func() bool { return len(n.driver.VMs()) == 0 })
	for _, id := range []string{half, none} {
		n.isGone(id)
	}
	q := n.again(p.ID())
	if s := q.Status(); s.State != NotReady || s.Reason != "Unreachable" || !strings.Contains(s.Message, "injected") {
		t.Errorf("got %+v", s)
	}
	if d, err := n.Manager.Container(c.ID()); err != nil || d.Status().State != Exited {
		t.Errorf("its container: %v", err)
	}
	if err := q.Stop(soon(t)); err != nil {
		t.Fatal(err)
	}
	if err := q.Remove(soon(t)); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
}

// TestRecoverGivenUp has a daemon that can't find its pods again, which is no fault of theirs: they run on, and
// the next one finds them.
func TestRecoverGivenUp(t *testing.T) {
	for name, c := range map[string]struct {
		attach error
		ends   bool // the daemon is asked to end
	}{
		"the daemon is asked to end":         {ends: true},
		"the node is out of inotify watches": {attach: fmt.Errorf("watch: %w", unix.ENOSPC)},
		"the node is out of descriptors":     {attach: fmt.Errorf("open: %w", unix.EMFILE)},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			p := n.pod(podConfig("web"))
			made := n.running(p, containerConfig("main"))
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
			n.driver.Fail("Attach", c.attach)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if c.ends {
				cancel()
			}
			n.open()
			if err := n.Recover(ctx); err == nil {
				t.Error("the daemon goes on")
			}
			n.driver.Fail("Attach", nil)
			n.restart(nil)
			if s := n.again(p.ID()).Status(); s.State != Ready || len(n.driver.VMs()) != 1 {
				t.Errorf("the pod is %s: %s %s", s.State, s.Reason, s.Message)
			}
			if d, err := n.Manager.Container(made.ID()); err != nil || d.Status().State != Running {
				t.Errorf("its container: %v", err)
			}
		})
	}
}

// TestRecoverSilentGuest: a guest that says nothing to a new daemon, as on a node that has a lot to do, is for
// the watchdog to judge. What it says later counts.
func TestRecoverSilentGuest(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	c := n.running(p, containerConfig("main"))
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	a := n.agentOf(p.ID())
	speak := a.silence()
	n.open()
	n.attach = 50 * time.Millisecond
	if err := n.Recover(soon(t)); err != nil {
		t.Fatal(err)
	}
	if s := n.again(p.ID()).Status(); s.State != Ready || len(n.driver.VMs()) != 1 {
		t.Errorf("the pod is %s: %s %s", s.State, s.Reason, s.Message)
	}
	a.exit(c.ID(), 3)
	speak()
	d, err := n.Manager.Container(c.ID())
	if err != nil {
		t.Fatal(err)
	}
	n.until("its exit shows", func() bool { return d.Status().State == Exited })
}

// TestRecoverHalfMadeStays: what can't be taken back at the start shows, so that it can be removed later.
func TestRecoverHalfMadeStays(t *testing.T) {
	for name, config := range map[string]PodConfig{"a pod's": podConfig("half"), "nobody's": {}} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			id := newID()
			n.restart(func() {
				r := podRecord{ID: id, Config: config, Created: time.Now(), Stage: starting, Driver: "fake", VM: n.vmConfig(id)}
				if err := errors.Join(os.MkdirAll(n.layout.containers(id), 0o700), state.Write(n.layout.record(id), r)); err != nil {
					t.Fatal(err)
				}
				n.network.up = map[string]bool{id: true}
				n.network.failing("Teardown", errInjected)
			})
			p := n.again(id)
			if s := p.Status(); s.State != NotReady || s.Reason != "StartFailed" || s.Config.Name == "" || !strings.Contains(s.Message, "injected") {
				t.Errorf("got %+v", s)
			}
			n.network.failing("", nil)
			if err := p.Remove(soon(t)); err != nil {
				t.Fatal(err)
			}
			n.nothingLeft()
		})
	}
}

// TestRecoverFallen has the daemon die after it recorded that a pod fell, and before it ended its VM.
func TestRecoverFallen(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	c := n.running(p, containerConfig("main"))
	n.restart(func() {
		r := p.record.now()
		r.Stage, r.Reason, r.Message = stopped, "Unreachable", "it answered nothing"
		if err := state.Write(n.layout.record(p.ID()), r); err != nil {
			t.Fatal(err)
		}
	})
	n.until("its VM is ended", func() bool { return len(n.driver.VMs()) == 0 })
	d, err := n.Manager.Container(c.ID())
	if err != nil {
		t.Fatal(err)
	}
	if s := d.Status(); s.State != Exited || s.Reason != "Unreachable" || s.Message != "it answered nothing" {
		t.Errorf("its container: %+v", s)
	}
	if err := n.again(p.ID()).Remove(soon(t)); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
}

// TestRecoverHalfMadeContainer has the daemon die in the middle of a creation.
func TestRecoverHalfMadeContainer(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	a := n.agentOf(p.ID())
	id := newID()
	n.restart(func() {
		if _, err := a.Create(soon(t), &agent.CreateRequest{Id: id}); err != nil {
			t.Fatal(err)
		}
	})
	if len(n.Containers()) > 0 {
		t.Error("it shows")
	}
	n.until("it is removed from the guest", func() bool { return a.container(id) == nil })
	n.running(n.again(p.ID()), containerConfig("main"))
}

// TestRecoverManyUnknown: a guest that tells of containers which nobody knows, and removes none of them, is asked
// no longer than a pod may take.
func TestRecoverManyUnknown(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	a, stuck := n.agentOf(p.ID()), make(chan struct{})
	defer close(stuck)
	a.do(func() {
		for range 100 {
			a.reports = append(a.reports, &agent.ContainerState{Id: newID(), State: agent.State_STATE_RUNNING})
		}
		a.before["Remove"] = func() { <-stuck }
	})
	n.open()
	n.attach = 100 * time.Millisecond
	if err := n.Recover(soon(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := n.again(p.ID()).Stats(soon(t)); err != nil { // what was asked before has come by then
		t.Error(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if asked := a.calls["Remove"]; asked > 1 {
		t.Errorf("it was asked to remove %d", asked)
	}
}

// TestRecoverStrangers leaves alone what is no pod's.
func TestRecoverStrangers(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	strangers := []string{filepath.Join(n.layout.pods(), "lost+found"), filepath.Join(n.dir, "run", "other")}
	n.restart(func() {
		for _, path := range strangers {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		}
	})
	for _, path := range strangers {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	if s := n.again(p.ID()).Status(); s.State != Ready || len(n.Pods()) != 1 {
		t.Errorf("%d pods, and %+v", len(n.Pods()), s)
	}
}

// TestRecoverMany restarts over more pods than are attached to at once.
func TestRecoverMany(t *testing.T) {
	n := newNode(t)
	for i := range attachAtOnce + 8 {
		n.pod(podConfig(fmt.Sprint("web-", i)))
	}
	n.restart(nil)
	for _, p := range n.Pods() {
		if s := p.Status(); s.State != Ready {
			t.Errorf("got %+v", s)
		}
	}
	if len(n.Pods()) != attachAtOnce+8 {
		t.Errorf("%d pods", len(n.Pods()))
	}
}
