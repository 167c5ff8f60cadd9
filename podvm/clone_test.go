package podvm

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/vmmtest"
)

// oneTemplate is a store of one template, with a disk in it.
type oneTemplate struct {
	dir    string
	err    error
	failed atomic.Int32
	worked atomic.Int32
}

func (o *oneTemplate) Template(context.Context, string) (string, error) { return o.dir, o.err }
func (o *oneTemplate) Failed(string)                                    { o.failed.Add(1) }
func (o *oneTemplate) Worked(string)                                    { o.worked.Add(1) }
func (o *oneTemplate) Disk(dir string) string                           { return filepath.Join(dir, "disk.img") }

// starts counts what metrics are told.
type starts struct {
	all, warm, fallbacks, gone, unreachable atomic.Int32

	mu     sync.Mutex
	failed [][]Phase // of each
}

func (s *starts) ObserveStart(origin string, _ []Phase) {
	s.all.Add(1)
	if origin == "warm" {
		s.warm.Add(1)
	}
}
func (s *starts) ObserveFailedStart(phases []Phase) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = append(s.failed, phases)
}
func (s *starts) ObserveFallback() { s.fallbacks.Add(1) }
func (s *starts) ObserveLoss(reason string) {
	switch reason {
	case "VMGone":
		s.gone.Add(1)
	case "Unreachable":
		s.unreachable.Add(1)
	}
}

func cloningNode(t *testing.T) (*node, *oneTemplate, *starts) {
	n, template, seen := newNode(t), &oneTemplate{dir: t.TempDir()}, &starts{}
	if err := os.WriteFile(template.Disk(template.dir), []byte("as the guest left it"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(template.Disk(template.dir), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	n.templates, n.starts = template, seen
	n.start()
	return n, template, seen
}

// TestPodsAreClones: each has a disk of its own that is the template's.
func TestPodsAreClones(t *testing.T) {
	n, template, seen := cloningNode(t)
	a, b := n.pod(podConfig("a")), n.pod(podConfig("b"))
	paths := map[string]bool{}
	for _, p := range []*Pod{a, b} {
		c := p.record.now().VM
		if c.Template != template.dir {
			t.Errorf("the record says template %q", c.Template)
		}
		if data, err := os.ReadFile(c.Disk.Path); err != nil || len(data) != 1<<20 || string(data[:6]) != "as the" {
			t.Errorf("disk of %d bytes, %v", len(data), err)
		}
		paths[c.Disk.Path] = true
	}
	if len(paths) != 2 || seen.all.Load() != 2 || seen.fallbacks.Load() != 0 || template.worked.Load() != 2 {
		t.Errorf("%d disks, %d starts, %d fallbacks", len(paths), seen.all.Load(), seen.fallbacks.Load())
	}
}

// TestFailedCloneIsBootedCold has no template, one whose disk is gone, and one that does not start.
func TestFailedCloneIsBootedCold(t *testing.T) {
	for name, spoil := range map[string]func(n *node, o *oneTemplate){
		"no template": func(_ *node, o *oneTemplate) { o.err = errInjected },
		"no disk":     func(_ *node, o *oneTemplate) { os.Remove(o.Disk(o.dir)) },
		"no clone": func(n *node, _ *oneTemplate) {
			n.driver.Refuse = func(c vmm.Config) error {
				if c.Template != "" {
					return errInjected
				}
				return nil
			}
		},
		"no answer": func(n *node, _ *oneTemplate) {
			n.driver.Serve = func(v *vmmtest.FakeVM, c net.Conn) {
				if v.Config().Template != "" {
					c.Close()
					v.Kill(context.Background())
					return
				}
				n.agentOf(v.ID()).serve(c)
			}
		},
		"silence": func(n *node, _ *oneTemplate) {
			n.silent(func(v *vmmtest.FakeVM) bool { return v.Config().Template != "" })
		},
	} {
		t.Run(name, func(t *testing.T) {
			n, template, seen := cloningNode(t)
			spoil(n, template)
			p := n.pod(podConfig("web"))
			c := p.record.now().VM
			if c.Template != "" || seen.fallbacks.Load() != 1 || (template.failed.Load() == 1) != (name != "no template") {
				t.Errorf("template %q, %d fallbacks, %d failures", c.Template, seen.fallbacks.Load(), template.failed.Load())
			}
			var st unix.Stat_t
			if err := unix.Stat(c.Disk.Path, &st); err != nil || st.Size != 16<<20 {
				t.Errorf("disk of %d bytes, %v: want one of its own", st.Size, err)
			}
		})
	}
}

// silent has the guests of these VMs take streams and say nothing, and has nobody wait long for that.
func (n *node) silent(which func(*vmmtest.FakeVM) bool) {
	n.patience = 100 * time.Millisecond
	n.Manager.patience = n.patience
	n.driver.Serve = func(v *vmmtest.FakeVM, c net.Conn) {
		if which(v) {
			io.Copy(io.Discard, c) // until who dialled hangs up
			c.Close()
			return
		}
		n.agentOf(v.ID()).serve(c)
	}
}

// TestCloneIsNotToBlame: that it was given up for another reason, or had no room, says nothing of its
// template.
func TestCloneIsNotToBlame(t *testing.T) {
	for name, spoil := range map[string]func(n *node){
		"given up": func(n *node) {
			dialled := make(chan struct{})
			n.driver.Serve = func(_ *vmmtest.FakeVM, c net.Conn) { close(dialled); io.Copy(io.Discard, c) }
			n.network.failing("Setup", errInjected)
			n.network.hook = func() { <-dialled }
		},
		"no room": func(n *node) {
			n.driver.Refuse = func(vmm.Config) error { return errdefs.ErrResourceExhausted }
		},
	} {
		t.Run(name, func(t *testing.T) {
			n, template, _ := cloningNode(t)
			spoil(n)
			if _, err := n.Run(soon(t), podConfig("web")); err == nil {
				t.Error("it started")
			}
			if f := template.failed.Load(); f != 0 {
				t.Errorf("%d failures are told", f)
			}
			n.nothingLeft()
		})
	}
}

// TestPodLargerThanClones boots, and can have all that the node gives; smaller ones, warm or not, are clones, which
// can't become as large.
func TestPodLargerThanClones(t *testing.T) {
	n, _, seen := cloningNode(t)
	n.warm = 1
	n.restart(nil)
	warm := n.awaitWarm()
	config := podConfig("large")
	config.Resources = &Resources{Memory: n.o.MaxClone.Memory}
	large := n.pod(config)
	if vm := large.record.now().VM; large.id == warm || vm.Template != "" || vm.Max != n.o.Max || large.machine().Info().Size.Memory < n.o.MaxClone.Memory {
		t.Errorf("a pod that may have more than a clone can is %+v", vm)
	}
	small := n.pod(podConfig("small"))
	if vm := small.record.now().VM; small.id != warm || vm.Template == "" || vm.Max != n.o.MaxClone {
		t.Errorf("another one is %+v", vm)
	}
	if err := small.Update(soon(t), nil, &Resources{Memory: n.o.MaxClone.Memory}); !errdefs.IsOutOfRange(err) || !strings.Contains(err.Error(), "vm.max_clone_memory") {
		t.Errorf("a clone that is to become larger: %v", err)
	}
	if seen.fallbacks.Load() > 0 {
		t.Error("a pod that is not to be a clone counts as one that could not be one")
	}
}

// TestCloned: a template is in use while a clone of it runs.
func TestCloned(t *testing.T) {
	n, template, _ := cloningNode(t)
	p := n.pod(podConfig("web"))
	if !n.Cloned(template.dir) || n.Cloned("/another") {
		t.Error("a clone runs that is not known")
	}
	if err := p.Stop(soon(t)); err != nil {
		t.Fatal(err)
	}
	if n.Cloned(template.dir) {
		t.Error("the clone has ended")
	}
}
