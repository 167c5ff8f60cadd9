package podvm

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestRunSaysItsPhase: a start that takes too long for its caller is in the log, in the error and in the metrics.
func TestRunSaysItsPhase(t *testing.T) {
	n := newNode(t)
	var log syncBuffer
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	t.Cleanup(func() { slog.SetDefault(old) })
	at, proceed := make(chan struct{}), make(chan struct{})
	n.born = func(a *fakeAgent) { a.before["Setup"] = func() { close(at); <-proceed } }
	first := n.asks(soon(t), podConfig("web"))
	<-at
	if log := log.String(); !strings.Contains(log, `msg="pod starts" pod=`) || !strings.Contains(log, "name=default/web") {
		t.Errorf("the log says %q", log)
	}
	n.until("only the guest is waited for", func() bool {
		got := n.Starting()
		return got["setup"] == 1 && got["network"] == 0
	})
	// The client hangs up at the deadline, and the answer comes before that.
	ctx, cancel := context.WithTimeout(t.Context(), late/2+50*time.Millisecond)
	defer cancel()
	_, err := n.Run(ctx, podConfig("web"))
	if !errors.Is(err, context.DeadlineExceeded) || !regexp.MustCompile(`default/web goes on, in its phase setup for \d s: `).MatchString(err.Error()) {
		t.Errorf("got %v", err)
	}
	if ctx.Err() != nil {
		t.Error("the answer came after the deadline")
	}
	close(proceed)
	if err := <-first; err != nil {
		t.Error(err)
	}
	for phase, pods := range n.Starting() {
		if pods != 0 {
			t.Errorf("%d pods are in the phase %s", pods, phase)
		}
	}
}

// TestFailedStartIsObserved: the phase that failed, and what took it back.
func TestFailedStartIsObserved(t *testing.T) {
	n, _, seen := cloningNode(t)
	n.network.failing("Setup", errInjected)
	if _, err := n.Run(soon(t), podConfig("web")); !errors.Is(err, errInjected) {
		t.Fatal(err)
	}
	seen.mu.Lock()
	defer seen.mu.Unlock()
	if len(seen.failed) != 1 || seen.all.Load() != 0 {
		t.Fatalf("observed: %v", seen.failed)
	}
	failed := map[string]bool{}
	for _, p := range seen.failed[0] {
		failed[p.Name] = p.Failed
		if p.Name != "total" && !slices.Contains(startPhases, p.Name) {
			t.Errorf("%s is none of startPhases", p.Name)
		}
	}
	undone, ok := failed["undo"]
	if !failed["network"] || !failed["total"] || failed["record"] || !ok || undone {
		t.Errorf("observed: %v", seen.failed[0])
	}
}

// TestPhasesOfStarts: metrics know all of them.
func TestPhasesOfStarts(t *testing.T) {
	n, _, _ := cloningNode(t)
	for _, p := range n.pod(podConfig("web")).Status().Phases {
		if p.Failed || p.Name != "total" && !slices.Contains(startPhases, p.Name) {
			t.Errorf("%+v", p)
		}
	}
}

// syncBuffer is one that several may write to.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
