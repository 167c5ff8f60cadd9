// Package undo runs the clean-up of a half-done operation in reverse order.
package undo

import (
	"context"
	"log/slog"
	"time"
)

// limit bounds each undo step, so that one stuck step can't keep the others from running.
const limit = 30 * time.Second

// Stack collects the steps that take back what an operation has done so far. Use:
//
//	var u undo.Stack
//	defer u.Run()
//	u.Push("delete netns", func(ctx context.Context) error { ... })
//	...
//	u.Release() // all went well: keep what was done
//
// The zero value is ready. A Stack belongs to one goroutine.
type Stack struct {
	steps []step
}

type step struct {
	name string
	do   func(context.Context) error
}

// Push adds a step. Its context is the step's own: it has a deadline and does not end with the
// operation that failed.
func (s *Stack) Push(name string, do func(context.Context) error) {
	s.steps = append(s.steps, step{name, do})
}

// Release forgets all steps: the operation succeeded.
func (s *Stack) Release() { s.steps = nil }

// Run runs the steps, last first. A step that fails is logged and the rest still run.
func (s *Stack) Run() {
	for i := len(s.steps) - 1; i >= 0; i-- {
		s.steps[i].run()
	}
	s.steps = nil
}

func (s step) run() {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := s.do(ctx); err != nil {
		slog.Error("undo", "step", s.name, "err", err)
	}
}
