package podvm

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// stopwatch times the phases of what is being made. Its methods may be called concurrently.
type stopwatch struct {
	began time.Time

	mu      sync.Mutex
	phases  []Phase
	running []*Phase // in the order in which they began; Took is not set yet
}

// startPhases are those of a pod's start, for metrics. "undo" is what takes back a start or a clone that failed.
var startPhases = []string{"record", "netns", "network", "nics", "template", "scratch", "vm", "guest", "setup", "addresses", "size", "ready", "undo"}

// time runs a phase and names it in its error. Phases may run at the same time.
func (s *stopwatch) time(name string, do func() error) error {
	p := s.beginPhase(name)
	err := do()
	s.endPhase(p, err)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (s *stopwatch) beginPhase(name string) *Phase {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := &Phase{Name: name, Start: time.Since(s.began)}
	s.running = append(s.running, p)
	return p
}

func (s *stopwatch) endPhase(p *Phase, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running = slices.DeleteFunc(s.running, func(r *Phase) bool { return r == p })
	p.Took, p.Failed = time.Since(s.began)-p.Start, err != nil
	s.phases = append(s.phases, *p)
}

// all returns the phases so far, and "total", which failed with err.
func (s *stopwatch) all(err error) []Phase {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append(s.phases[:len(s.phases):len(s.phases)], Phase{Name: "total", Took: time.Since(s.began), Failed: err != nil})
}

// phase is that which runs for the longest time; "" between two.
func (s *stopwatch) phase() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.running) == 0 {
		return ""
	}
	return s.running[0].Name
}

// doing says which phases run, and for how long; "" between two.
func (s *stopwatch) doing() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []string
	for _, p := range s.running {
		all = append(all, fmt.Sprintf("%s for %.0f s", p.Name, (time.Since(s.began)-p.Start).Seconds()))
	}
	return strings.Join(all, ", ")
}
