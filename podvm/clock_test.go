package podvm

import (
	"testing"
	"time"
)

// TestClocks: guests whose clocks are away from the node's get it, others are left alone.
func TestClocks(t *testing.T) {
	n := newNode(t)
	for name, behind := range map[string]time.Duration{
		"right": 0, "behind": 2 * time.Hour, "ahead": -26 * time.Hour, "a little": 300 * time.Millisecond,
	} {
		t.Run(name, func(t *testing.T) {
			p := n.pod(podConfig(name))
			a := n.agentOf(p.ID())
			a.do(func() { a.behind = behind })
			n.setClocks(t.Context())
			a.do(func() {
				if a.behind.Abs() > 200*time.Millisecond {
					t.Errorf("it is %v behind", a.behind)
				}
				if want := map[bool]int{true: 1, false: 2}[behind == 0]; a.calls["Clock"] != want {
					t.Errorf("it was asked %d times, want %d", a.calls["Clock"], want)
				}
			})
			if err := p.Remove(soon(t)); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestClocksKept: they are set from the beginning on, also where another guest can't be asked.
func TestClocksKept(t *testing.T) {
	n := newNode(t)
	broken, other := n.pod(podConfig("broken")), n.pod(podConfig("other"))
	n.agentOf(broken.ID()).do(func() { n.agentOf(broken.ID()).fail["Clock"] = errInjected })
	a := n.agentOf(other.ID())
	a.do(func() { a.behind = time.Hour })
	n.KeepClocks()
	n.until("clock", func() (set bool) {
		a.do(func() { set = a.behind.Abs() < time.Minute })
		return set
	})
}
