package share

import (
	"context"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// TestRelievePauses: a guest that knows too much is told at once, then after pauses that grow for as long as it
// has no effect, and never while it asks for nothing, or knows little.
func TestRelievePauses(t *testing.T) {
	for name, c := range map[string]struct {
		forgets     bool
		least, most int // times in an hour
	}{"one that forgets": {true, 3600, 3600}, "one that does not": {false, 60, 80}} {
		synctest.Test(t, func(t *testing.T) {
			scarce, begin := make(chan struct{}, 1), time.Now()
			var full bool
			var told []time.Duration
			go relieve(scarce, func() bool { return full }, func() {
				told = append(told, time.Since(begin))
				full = !c.forgets
			})
			ask := func() {
				select {
				case scarce <- struct{}{}:
				default:
				}
				time.Sleep(10 * time.Millisecond)
			}
			ask()
			if len(told) != 0 {
				t.Errorf("%s was told when it knew little", name)
			}
			begin = time.Now()
			for range 3600 {
				full = true
				for range 100 {
					ask()
				}
			}
			if n := len(told); n < c.least || n > c.most || told[0] != 0 {
				t.Errorf("%s was told %d times in an hour, the first after %v; want %d to %d, and 0", name, n, told[0], c.least, c.most)
			}
			time.Sleep(2 * relieveMost)
			before := len(told)
			time.Sleep(time.Hour)
			if n := len(told); n > before {
				t.Errorf("%s was told %d times while it asked for nothing", name, n-before)
			}
			close(scarce)
		})
	}
}

// TestDropNames: a guest is told over the link of each directory that has a stream.
func TestDropNames(t *testing.T) {
	one, _ := serveDir(t, false)
	other, _ := serveDir(t, false) // without a stream
	all := sessions{byTag: map[string]*session{"one": one, "other": other}}
	here, there := net.Pipe()
	guest, got := agent.NewLink(), make(chan []byte)
	one.link.Take()
	guest.Take()
	go one.link.Run(here, 0, one.deliver)
	go guest.Run(there, 0, func(_ context.Context, m []byte) error { got <- m; return nil })
	for !one.link.Connected() {
		time.Sleep(time.Millisecond)
	}
	all.dropNames()
	if m := <-got; !agent.IsDropNames(m) {
		t.Errorf("it was told %x", m)
	}
	guest.Close()
}
