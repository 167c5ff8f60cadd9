package podvm

import (
	"fmt"
	"sync"
	"time"
)

// stopwatch times the phases of what is being made. Its methods may be called concurrently.
type stopwatch struct {
	began time.Time

	mu     sync.Mutex
	phases []Phase
}

// time runs a phase and names it in its error. Phases may run at the same time.
func (s *stopwatch) time(name string, do func() error) error {
	start := time.Since(s.began)
	err := do()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.phases = append(s.phases, Phase{name, start, time.Since(s.began) - start})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// all returns the phases so far, and "total".
func (s *stopwatch) all() []Phase {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append(s.phases[:len(s.phases):len(s.phases)], Phase{"total", 0, time.Since(s.began)})
}
