package podvm

import (
	"fmt"
	"maps"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/vmmtest"
)

// warmNode keeps one clone warm.
func warmNode(t *testing.T) (*node, *starts) {
	n, _, seen := cloningNode(t)
	n.warm = 1
	n.restart(nil)
	n.awaitWarm()
	return n, seen
}

// awaitWarm waits until the pool is full, and returns the id of what is in it.
func (n *node) awaitWarm() (id string) {
	n.t.Helper()
	n.until("a clone is warm", func() bool {
		n.pool.mu.Lock()
		defer n.pool.mu.Unlock()
		if len(n.pool.ready) == 0 {
			return false
		}
		id = n.pool.ready[0].id
		return true
	})
	return id
}

// isGone looks for a VM, a network or a folder of the pod.
func (n *node) isGone(id string) {
	n.t.Helper()
	for _, v := range n.driver.VMs() {
		if v.ID() == id {
			n.t.Errorf("VM %s still runs", id)
		}
	}
	for _, dir := range []string{n.layout.pod(id), n.layout.run(id)} {
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			n.t.Errorf("%s is left: %v", dir, err)
		}
	}
	n.network.mu.Lock()
	defer n.network.mu.Unlock()
	if n.network.up[id] {
		n.t.Errorf("the network of %s is left", id)
	}
}

// TestWarm: a pod becomes the clone that waits, and the next one waits soon.
func TestWarm(t *testing.T) {
	n, seen := warmNode(t)
	first := n.awaitWarm()
	if pods := n.Pods(); len(pods) != 0 {
		t.Errorf("a clone that waits is shown as pod: %v", pods)
	}
	p := n.pod(podConfig("web"))
	if p.id != first || seen.warm.Load() != 1 {
		t.Errorf("the pod is %s, %d from the pool, want %s", p.id, seen.warm.Load(), first)
	}
	if s := p.Status(); s.Config.Name != "web" || s.State != Ready || len(s.IPs) == 0 {
		t.Errorf("status: %+v", s)
	}
	a := n.agentOf(first)
	a.mu.Lock()
	calls, hostname := maps.Clone(a.calls), a.setup.Hostname
	a.mu.Unlock()
	if calls["Rehearse"] != 1 || calls["Setup"] != 1 || hostname != first[:12] {
		t.Errorf("the agent was called %v, for host name %q", calls, hostname)
	}
	if next := n.awaitWarm(); next == first {
		t.Error("the pod is still in the pool")
	}
	n.restart(nil) // as what it is, the pod
	if got, err := n.Pod(first); err != nil || got.Status().State != Ready {
		t.Errorf("after a restart: %v", err)
	}
}

// TestWarmCloneEnds: it is replaced, and nothing of it is left.
func TestWarmCloneEnds(t *testing.T) {
	n, _ := warmNode(t)
	first := n.awaitWarm()
	for _, v := range n.driver.VMs() {
		v.Kill(t.Context())
	}
	n.until("another one is warm", func() bool { return n.awaitWarm() != first })
	n.isGone(first)
}

// TestWarmCloneEndsAsItIsWanted: the pod gets another VM, and nothing of the clone is left.
func TestWarmCloneEndsAsItIsWanted(t *testing.T) {
	n, _ := warmNode(t)
	first := n.awaitWarm()
	n.pool.mu.Lock() // whoever waits for its end can't have put it away yet
	n.driver.VMs()[0].End(errInjected)
	taken := n.pool.takeLocked()
	n.pool.mu.Unlock()
	if taken != nil {
		t.Error("a pod gets a clone that has ended")
	}
	n.until("another one is warm", func() bool { return n.awaitWarm() != first })
	n.isGone(first)
}

// TestWarmAndTheDaemonEnds: in order, or killed.
func TestWarmAndTheDaemonEnds(t *testing.T) {
	n, _ := warmNode(t)
	first := n.awaitWarm()
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	n.isGone(first)
	n.start()
	second := n.awaitWarm()
	n.pool.cancel() // as if it was killed
	n.pool.work.Wait()
	n.start()
	n.awaitWarm()
	n.isGone(second)
}

// TestWarmCloneIsOfNoUse: one that has died, or hangs, is replaced, and the pod starts.
func TestWarmCloneIsOfNoUse(t *testing.T) {
	for name, spoil := range map[string]func(v *vmmtest.FakeVM, hangs chan struct{}){
		"dead":  func(v *vmmtest.FakeVM, _ chan struct{}) { v.End(errInjected) },
		"hangs": func(_ *vmmtest.FakeVM, hangs chan struct{}) { <-hangs },
	} {
		t.Run(name, func(t *testing.T) {
			n, seen := warmNode(t)
			n.Manager.patience = time.Second
			first, hangs := n.awaitWarm(), make(chan struct{})
			defer close(hangs)
			warm, a := n.driver.VMs()[0], n.agentOf(first)
			var asked atomic.Bool
			a.do(func() {
				a.before["Setup"] = func() {
					if !asked.Swap(true) {
						spoil(warm, hangs)
					}
				}
			})
			p := n.pod(podConfig("web"))
			if s := p.Status(); p.id != first || s.State != Ready || s.VMM.PID == warm.Info().PID || seen.warm.Load() != 0 || seen.all.Load() != 1 {
				t.Errorf("the pod is %s, %+v, %d of %d from the pool", p.id, s, seen.warm.Load(), seen.all.Load())
			}
			n.running(p, containerConfig("main"))
			if c := p.record.now().VM; c.Template == "" {
				t.Error("it was booted cold")
			}
			if err := p.Remove(soon(t)); err != nil {
				t.Fatal(err)
			}
			n.isGone(first)
		})
	}
}

// TestWarmPodUndone: a start that fails, whatever VM the pod has, takes back what came from the pool.
func TestWarmPodUndone(t *testing.T) {
	for _, method := range []string{"Setup", "Network"} {
		t.Run(method, func(t *testing.T) {
			n, _ := warmNode(t)
			first := n.awaitWarm()
			a := n.agentOf(first)
			a.do(func() { a.fail[method] = errInjected })
			if _, err := n.Run(t.Context(), podConfig("web")); err == nil {
				t.Fatal("it started")
			}
			n.isGone(first)
			n.pod(podConfig("web"))
		})
	}
}

// TestNotWarm: what fails to become warm is undone.
func TestNotWarm(t *testing.T) {
	n, _, _ := cloningNode(t)
	n.born = func(a *fakeAgent) { a.fail["Rehearse"] = errInjected }
	n.warm = 1
	n.restart(nil)
	n.until("it is undone", func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return len(n.agents) > 0 && len(n.driver.VMs()) == 0
	})
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	for id := range n.agents {
		n.isGone(id)
	}
}

// learner is a driver whose clones teach their template, or fail to.
type learner struct {
	*vmmtest.Fake
	fails bool
	asked atomic.Int32
	mu    sync.Mutex
	knows map[string]int
}

// taught is how many clones it takes.
const taught = 2

func (l *learner) Learn(v vmm.VM) error {
	l.asked.Add(1)
	if l.fails {
		return errInjected
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.knows[v.(*vmmtest.FakeVM).Config().Template]++
	return nil
}

func (l *learner) Learned(template string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.knows[template] >= taught
}

// TestTeach: clones with a container teach the template, as many as it takes, and are taken back: no pod gets
// one. A template that does not learn is given up soon.
func TestTeach(t *testing.T) {
	for _, warm := range []int{0, 1} {
		for _, fails := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d warm, fails %v", warm, fails), func(t *testing.T) {
				n, template, _ := cloningNode(t)
				l := &learner{Fake: n.driver, fails: fails, knows: map[string]int{}}
				n.learner, n.warm = l, warm
				n.restart(nil)
				n.until("the template is taught", func() bool { return l.Learned(template.dir) || fails && l.asked.Load() > 0 })
				n.until("a clone is kept, the others are taken back", func() bool { return n.WarmClones() == warm && len(n.driver.VMs()) == warm })
				n.until("nothing is in the way of the next one", func() bool { return l.Learned(template.dir) || l.asked.Load() == lessonsMax })
				n.pod(podConfig("a")).Stop(t.Context())
				n.until("as many are warm as before", func() bool { return n.WarmClones() == warm })
				n.pod(podConfig("b"))
				if err := n.Close(); err != nil {
					t.Fatal(err)
				}
				if asked := l.asked.Load(); asked != taught && !fails || asked > lessonsMax {
					t.Errorf("%d clones were to teach it", asked)
				}
				for id := range n.agents {
					a := n.agentOf(id)
					if a.calls["Rehearse with an image"] > 0 && (a.setup != nil || a.calls["Rehearse"] > 0) {
						t.Errorf("a clone that has taught the template was used for more: %v", a.calls)
					}
				}
			})
		}
	}
}
