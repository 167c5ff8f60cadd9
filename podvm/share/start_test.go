package share

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/podvm/vmm/process"
)

// TestOOMScore: the process is as expendable as the VMM in whose cgroup it is, also one that takes the place of
// another.
func TestOOMScore(t *testing.T) {
	run := t.TempDir()
	vmm, err := process.Start(process.Spec{Path: "/bin/sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { vmm.Kill(context.Background()) })
	if err := vmm.Save(run); err != nil {
		t.Fatal(err)
	}
	if err := process.SetOOMScore(run, 700); err != nil {
		t.Fatal(err)
	}
	s := New("/bin/sleep")
	t.Cleanup(s.Close)
	p := s.of(Pod{ID: "1000", Dir: run}) // for sleep, a time
	t.Cleanup(func() { s.Release(context.Background(), run) })
	if err := p.lock(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer p.unlock()
	want := func(score int) {
		t.Helper()
		got, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", p.process.PID()))
		if err != nil || strings.TrimSpace(string(got)) != fmt.Sprint(score) {
			t.Errorf("got %q, %v; want %d", got, err, score)
		}
	}
	for range 2 {
		if err := p.run(t.Context()); err != nil {
			t.Fatal(err)
		}
		want(700)
		if err := s.SetOOMScore(run, 800); err != nil {
			t.Fatal(err)
		}
		want(800)
		if err := p.process.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}
