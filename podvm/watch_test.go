package podvm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// TestVMEnds kills the VM under a running pod.
func TestVMEnds(t *testing.T) {
	n, seen := newNode(t), &starts{}
	n.starts = seen
	n.restart(nil)
	config := podConfig("web")
	config.LogDir = filepath.Join(n.dir, "logs")
	p := n.pod(config)
	started, created := n.running(p, containerConfig("started")), n.container(p, containerConfig("created"))
	n.agentOf(p.ID()).say(started.ID(), "last words")
	n.until("log", func() bool { data, _ := os.ReadFile(started.Status().LogPath); return len(data) > 0 })
	began := time.Now()
	n.driver.VMs()[0].End(errors.New("guest panic\x1b[31m: " + strings.Repeat("x", 5000)))
	n.until("end", func() bool {
		return p.Status().State == NotReady && started.Status().State == Exited && created.Status().State == Exited
	})
	if took := time.Since(began); took > time.Second {
		t.Errorf("it took %v to be seen", took)
	}
	if s := p.Status(); s.Reason != "VMGone" || !strings.Contains(s.Message, "guest panic") || strings.Contains(s.Message, "\x1b") || len(s.Message) > 2000 {
		t.Errorf("got %s, %s", s.Reason, s.Message)
	}
	if s := started.Status(); s.ExitCode != 255 || s.Reason != "VMGone" || s.Finished.IsZero() {
		t.Errorf("got %+v", s)
	}
	if _, err := p.Create(soon(t), containerConfig("late")); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "guest panic") {
		t.Errorf("create: %v", err)
	}
	if err := started.Stop(soon(t), time.Minute); err != nil {
		t.Errorf("stop: %v", err)
	}
	if err := started.Remove(soon(t)); err != nil {
		t.Errorf("remove: %v", err)
	}
	if err := created.Start(soon(t)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start: %v", err)
	}
	if gone, unreachable := seen.gone.Load(), seen.unreachable.Load(); gone != 1 || unreachable != 0 {
		t.Errorf("told of %d that ended, %d that did not answer", gone, unreachable)
	}
	n.restart(nil)
	q, err := n.Pod(p.ID())
	if err != nil {
		t.Fatal(err)
	}
	if s := q.Status(); s.State != NotReady || s.Reason != "VMGone" {
		t.Errorf("after a restart: %+v", s)
	}
	if err := q.Stop(soon(t)); err != nil {
		t.Error(err)
	}
	if err := q.Remove(soon(t)); err != nil {
		t.Error(err)
	}
	n.nothingLeft()
}

// TestGuestAnswersNothing: who waits for such a guest finds out, also by calls that are given up early.
func TestGuestAnswersNothing(t *testing.T) {
	n, seen := newNode(t), &starts{}
	n.watchdog, n.starts = 200*time.Millisecond, seen
	n.restart(nil)
	p := n.pod(podConfig("web"))
	c := n.running(p, containerConfig("c"))
	a := n.agentOf(p.ID())
	stuck := make(chan struct{})
	defer close(stuck)
	a.do(func() {
		a.silent = true
		a.before["Stats"] = func() { <-stuck }
	})
	short, cancel := context.WithTimeout(t.Context(), n.watchdog/20)
	defer cancel()
	if _, err := p.Stats(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stats: %v", err)
	}
	n.until("end", func() bool { return p.Status().State == NotReady && c.Status().State == Exited })
	if s := p.Status(); s.Reason != "Unreachable" || !strings.Contains(s.Message, "answered nothing for 200ms") {
		t.Errorf("the pod: %s, %s", s.Reason, s.Message)
	}
	if s := c.Status(); s.ExitCode != 255 || s.Reason != "Unreachable" {
		t.Errorf("the container: %+v", s)
	}
	if all := n.driver.VMs(); len(all) > 0 {
		t.Errorf("%d VMs run on", len(all))
	}
	if gone, unreachable := seen.gone.Load(), seen.unreachable.Load(); gone != 0 || unreachable != 1 {
		t.Errorf("told of %d that ended, %d that did not answer", gone, unreachable)
	}
	if err := p.Remove(soon(t)); err != nil {
		t.Error(err)
	}
	n.nothingLeft()
}

// TestGuestTakesItsTime: a guest that is busy with a call, and answers others, is left alone.
func TestGuestTakesItsTime(t *testing.T) {
	n := newNode(t)
	n.watchdog = 200 * time.Millisecond
	n.restart(nil)
	p := n.pod(podConfig("web"))
	a := n.agentOf(p.ID())
	busy, answered := make(chan struct{}), make(chan error)
	a.do(func() { a.before["Stats"] = func() { <-busy } })
	const calls = 4 // each is silent for half of the limit before it is asked about: together longer than the limit
	for range calls {
		before := a.answered()
		go func() {
			_, err := p.Stats(soon(t))
			answered <- err
		}()
		n.until("another stream", func() bool { return a.answered() > before })
	}
	close(busy)
	for range calls {
		if err := <-answered; err != nil {
			t.Error(err)
		}
	}
	if s := p.Status(); s.State != Ready {
		t.Errorf("the pod: %s, %s", s.Reason, s.Message)
	}
}

// TestVMEndsWhileItIsKilled: its end is seen after who kills it has forgotten it.
func TestVMEndsWhileItIsKilled(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	p.setMachine(nil)
	n.driver.VMs()[0].End(errInjected)
	n.until("the pod is not ready", func() bool { return p.Status().State == NotReady })
	if s := p.Status(); !strings.Contains(s.Message, errInjected.Error()) {
		t.Errorf("got %q", s.Message)
	}
}

// terminationLog makes a file that a container may write.
func terminationLog(t *testing.T, n *node, c *ContainerConfig) string {
	t.Helper()
	path := filepath.Join(n.dir, "termination-log")
	if err := os.WriteFile(path, []byte("something longer than that"), 0o666); err != nil {
		t.Fatal(err)
	}
	c.Mounts = append(c.Mounts, Mount{HostPath: path, ContainerPath: "/dev/termination-log"})
	return path
}

func TestWriteBackBeforeExit(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	config := containerConfig("main")
	path := terminationLog(t, n, &config)
	read := filepath.Join(n.dir, "hosts")
	if err := os.WriteFile(read, []byte("hosts"), 0o644); err != nil {
		t.Fatal(err)
	}
	config.Mounts = append(config.Mounts, Mount{HostPath: read, ContainerPath: "/etc/hosts", ReadOnly: true})
	events := n.Events(soon(t))
	c := n.running(p, config)
	a := n.agentOf(p.ID())
	copies := a.container(c.ID()).request.Mounts
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	a.exit(c.ID(), 1,
		&agent.WrittenFile{Name: "../../etc/passwd", Content: []byte("x")},
		&agent.WrittenFile{Name: copies[1].GetFiles().Name, Content: []byte("forged")},
		&agent.WrittenFile{Name: copies[0].GetFiles().Name, Content: []byte("it broke")})
	for e := range events {
		if e.Kind == EventStopped {
			break
		}
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "it broke" {
		t.Errorf("when the end shows the message is %q, %v", data, err)
	}
	if data, _ := os.ReadFile(read); string(data) != "hosts" {
		t.Errorf("a read-only file became %q", data)
	}
	if now, err := os.Stat(path); err != nil || !os.SameFile(before, now) {
		t.Error("the file was replaced, and is mounted elsewhere")
	}
}

// TestWriteBackFollowsNoLink has a link, a directory and a FIFO take the file's place.
func TestWriteBackFollowsNoLink(t *testing.T) {
	n := newNode(t)
	victim := filepath.Join(n.dir, "victim")
	if err := os.WriteFile(victim, []byte("safe"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := n.pod(podConfig("web"))
	for name, replace := range map[string]func(path string) error{
		"link":      func(path string) error { return os.Symlink(victim, path) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"fifo":      func(path string) error { return unix.Mkfifo(path, 0o600) },
		"nothing":   func(string) error { return nil },
		"hugeness":  func(path string) error { return os.WriteFile(path, []byte("as it was"), 0o600) },
	} {
		config := containerConfig(name)
		path := terminationLog(t, n, &config)
		c := n.running(p, config)
		if err := errors.Join(os.Remove(path), replace(path)); err != nil {
			t.Fatal(err)
		}
		a := n.agentOf(p.ID())
		content := []byte("attack")
		if name == "hugeness" {
			content = make([]byte, 1<<20+1)
		}
		a.exit(c.ID(), 0, &agent.WrittenFile{Name: a.container(c.ID()).request.Mounts[0].GetFiles().Name, Content: content})
		n.until("exit with a "+name, func() bool { return c.Status().State == Exited })
		if data, _ := os.ReadFile(victim); string(data) != "safe" {
			t.Errorf("%s: the victim is %q", name, data)
		}
		if name == "hugeness" {
			if data, err := os.ReadFile(path); err != nil || string(data) != "as it was" {
				t.Errorf("too much was written back: %d bytes, %v", len(data), err)
			}
		}
		os.RemoveAll(path)
	}
}

// TestHostileReports has the guest say what can't be.
func TestHostileReports(t *testing.T) {
	n := newNode(t)
	p, other := n.pod(podConfig("web")), n.pod(podConfig("other"))
	foreign := n.running(other, containerConfig("foreign"))
	created, running := n.container(p, containerConfig("created")), n.running(p, containerConfig("running"))
	a := n.agentOf(p.ID())
	exited := agent.State_STATE_EXITED
	future := time.Now().Add(100 * 365 * 24 * time.Hour).UnixNano()
	a.do(func() {
		a.reports = append(a.reports,
			&agent.ContainerState{Id: foreign.ID(), State: exited, ExitCode: 9},
			&agent.ContainerState{Id: running.ID(), State: 77},
			&agent.ContainerState{Id: running.ID(), State: agent.State_STATE_CREATED},
			&agent.ContainerState{Synced: true}, &agent.ContainerState{Synced: true},
			&agent.ContainerState{Id: "", State: exited},
			&agent.ContainerState{Id: strings.Repeat("x", 1<<16), State: exited},
			&agent.ContainerState{Id: running.ID(), State: exited, ExitCode: -1 << 31, FinishedNs: future, OomKilled: true},
			&agent.ContainerState{Id: running.ID(), State: exited, ExitCode: 1, FinishedNs: -1 << 63},
			&agent.ContainerState{Id: running.ID(), State: agent.State_STATE_RUNNING},
			&agent.ContainerState{Id: created.ID(), State: exited, ExitCode: 300, FinishedNs: -1 << 63},
		)
		for _, c := range a.containers {
			c.ended = true
		}
	})
	n.until("exits", func() bool { return created.Status().State == Exited && running.Status().State == Exited })
	for _, c := range []*Container{created, running} {
		s := c.Status()
		if s.Finished.Before(s.Created) || s.Finished.After(time.Now()) || s.ExitCode < 0 || s.ExitCode > 255 {
			t.Errorf("got %+v", s)
		}
	}
	if s := running.Status(); s.Reason != "OOMKilled" {
		t.Errorf("the first end counts, but got %s", s.Reason)
	}
	if s := foreign.Status(); s.State != Running {
		t.Errorf("another pod's container is %s", s.State)
	}
	if s := p.Status(); s.State != Ready {
		t.Errorf("the pod is %+v", s)
	}
}

// TestHostileListing: what a guest lists is remembered only where it can be a container's id.
func TestHostileListing(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	a := n.agentOf(p.ID())
	for _, id := range []string{"", "x", strings.Repeat("x", 64), strings.Repeat("a", 1<<16)} {
		a.do(func() { a.reports = []*agent.ContainerState{{Id: id, State: agent.State_STATE_RUNNING}} })
		err := p.watchOnce(soon(t), func([]string) { t.Errorf("%.80q is in a listing", id) })
		if err == nil || !strings.Contains(err.Error(), "is no id") || len(err.Error()) > 200 {
			t.Errorf("%.80q: %v", id, err)
		}
	}
}

// TestWriteBackOnce: a file is written once, and only one of the container's, however many a guest tells of.
func TestWriteBackOnce(t *testing.T) {
	path := filepath.Join(resolved(t), "log")
	if err := os.WriteFile(path, []byte("as it was"), 0o600); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"a": path}
	for name, written := range map[string][]*agent.WrittenFile{
		"twice":   {{Name: "a", Content: []byte("first")}, {Name: "a", Content: []byte("second")}},
		"another": {{Name: "a", Content: []byte("first")}, {Name: "b"}, {Name: "b"}, {Name: "b"}},
	} {
		err := writeBackAll(files, written)
		if err == nil || strings.Count(err.Error(), "the guest tells") != 1 {
			t.Errorf("%s: %v", name, err)
		}
		if data, err := os.ReadFile(path); err != nil || string(data) != "first" {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
}

// TestWriteBackFollowsNoLinkAbove has a guest that can write to a directory above the file, which it shares,
// put a link to another one there.
func TestWriteBackFollowsNoLinkAbove(t *testing.T) {
	dir := resolved(t)
	ours, victim := filepath.Join(dir, "conf", "file"), filepath.Join(dir, "etc", "file")
	for _, path := range []string{ours, victim} {
		if err := errors.Join(os.Mkdir(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("safe"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(ours)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Rename(filepath.Dir(ours), filepath.Join(dir, "away")), os.Symlink(filepath.Dir(victim), filepath.Dir(ours))); err != nil {
		t.Fatal(err)
	}
	if err := writeBackAll(map[string]string{"a": ours}, []*agent.WrittenFile{{Name: "a", Content: []byte("attack")}}); err == nil {
		t.Error("a link was followed")
	}
	if data, err := os.ReadFile(victim); err != nil || string(data) != "safe" {
		t.Errorf("the victim is %q, %v", data, err)
	}
	if f, err := readFile(ours, "", info); err == nil {
		t.Errorf("a container gets %q", f.Content)
	}
}

// TestStopGrace stops a container that ignores its stop signal.
func TestStopGrace(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	c := n.running(p, containerConfig("main"))
	if err := c.Stop(soon(t), 50*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	signals := n.agentOf(p.ID()).container(c.ID()).signals
	if len(signals) != 2 || signals[0] != int32(unix.SIGUSR1) || signals[1] != int32(unix.SIGKILL) {
		t.Errorf("signals %v, want the image's SIGUSR1 and SIGKILL", signals)
	}
	if s := c.Status(); s.State != Exited || s.ExitCode != 137 {
		t.Errorf("got %+v", s)
	}
	polite := containerConfig("polite")
	polite.StopSignal = "SIGTERM"
	d := n.running(p, polite)
	began := time.Now()
	if err := d.Stop(soon(t), time.Minute); err != nil || time.Since(began) > 10*time.Second {
		t.Errorf("%v after %v", err, time.Since(began))
	}
	if s := d.Status(); s.ExitCode != 143 {
		t.Errorf("got %+v", s)
	}
}

// TestStopContainers: where the machine goes down, all containers get their stop signal, and their VMs wait for it.
func TestStopContainers(t *testing.T) {
	n := newNode(t)
	var all []*Container
	for _, name := range []string{"one", "two"} {
		p := n.pod(podConfig(name))
		for _, name := range []string{"main", "side"} {
			config := containerConfig(name)
			config.StopSignal = "SIGTERM"
			all = append(all, n.running(p, config))
		}
	}
	n.StopContainers(soon(t), time.Minute)
	for _, c := range all {
		if s := c.Status(); s.State != Exited || s.ExitCode == killedCode {
			t.Errorf("%s is %s with code %d", c.id, s.State, s.ExitCode)
		}
		if s := c.pod.Status(); s.State != Ready {
			t.Errorf("its pod is %s: %s", s.State, s.Reason)
		}
	}
}

// TestStopAgain: the kubelet repeats its calls, and shortens the grace period; the program is asked once.
func TestStopAgain(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	c := n.running(p, containerConfig("main"))
	a := n.agentOf(p.ID())
	signals := func() []int32 {
		a.mu.Lock()
		defer a.mu.Unlock()
		return slices.Clone(a.containers[c.ID()].signals)
	}
	a.do(func() { a.fail["Signal"] = errInjected })
	if err := c.Stop(soon(t), time.Minute); err == nil {
		t.Error("the signal was lost, and nobody is told")
	}
	a.do(func() { delete(a.fail, "Signal") })
	first := make(chan error, 1)
	go func() { first <- c.Stop(soon(t), time.Minute) }()
	n.until("the stop signal", func() bool { return len(signals()) == 1 })
	began := time.Now()
	if err := c.Stop(soon(t), 50*time.Millisecond); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took < 50*time.Millisecond || took > 10*time.Second {
		t.Errorf("the second call took %v", took)
	}
	if err := <-first; err != nil {
		t.Error(err)
	}
	if got := signals(); !slices.Equal(got, []int32{int32(unix.SIGUSR1), int32(unix.SIGKILL)}) {
		t.Errorf("signals %v, want the image's SIGUSR1 once, and SIGKILL", got)
	}
}

// TestStartFails has the guest refuse to run a container.
func TestStartFails(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	c := n.container(p, containerConfig("main"))
	a := n.agentOf(p.ID())
	a.do(func() { a.fail["Start"] = errors.Join(errors.New("no such command"), errdefs.ErrInvalidArgument) })
	if err := c.Start(soon(t)); err == nil || !strings.Contains(err.Error(), "no such command") {
		t.Errorf("got %v", err)
	}
	if s := c.Status(); s.State != Exited || s.Reason != "StartError" || s.ExitCode != 128 || !strings.Contains(s.Message, "no such command") {
		t.Errorf("got %+v", s)
	}
	if err := c.Remove(soon(t)); err != nil {
		t.Error(err)
	}
}
