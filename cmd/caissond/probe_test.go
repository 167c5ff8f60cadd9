package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/caisson-vm/caisson/podvm/state"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
)

// TestProbeIsRemembered: what is sure, and of the same program.
func TestProbeIsRemembered(t *testing.T) {
	for name, c := range map[string]struct {
		err        error
		remembered bool
	}{
		"works":     {nil, true},
		"VMM ended": {fmt.Errorf("dial: %w: KVM: internal error", vmm.ErrGone), true},
		"too slow":  {fmt.Errorf("the guest has not come up: %w", context.DeadlineExceeded), false},
		"no hope":   {fmt.Errorf("%w: %w", errHopeless, context.DeadlineExceeded), true},
		"no memory": {errors.New("cannot allocate memory"), false},
	} {
		t.Run(name, func(t *testing.T) {
			path, calls := filepath.Join(t.TempDir(), "probe.json"), 0
			ask := func(key string) {
				t.Helper()
				err := remembered(path, key, func() error { calls++; return c.err })
				if (err == nil) != (c.err == nil) || err != nil && err.Error() != c.err.Error() {
					t.Errorf("got %v, want %v", err, c.err)
				}
			}
			ask("qemu /usr/bin/qemu 7")
			ask("qemu /usr/bin/qemu 7")
			if want := map[bool]int{true: 1, false: 2}[c.remembered]; calls != want {
				t.Errorf("tried %d times, want %d", calls, want)
			}
			calls = 0
			if ask("qemu /opt/qemu 7"); calls != 1 {
				t.Error("another program was not tried")
			}
		})
	}
}

// TestProbeIsSwept: one whose process was killed is taken back, one that runs is not.
func TestProbeIsSwept(t *testing.T) {
	dir := t.TempDir()
	left, running := filepath.Join(dir, probePrefix+"1"), filepath.Join(dir, probePrefix+"2")
	vmms := map[string]*process.Process{}
	for _, path := range []string{left, running} {
		p, err := process.Start(process.Spec{Path: "/bin/sleep", Args: []string{"1000"}})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Kill(context.Background())
		if err := errors.Join(os.Mkdir(path, 0o700), p.Save(path)); err != nil {
			t.Fatal(err)
		}
		vmms[path] = p
	}
	lock, err := state.Acquire(running, "state")
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Release()
	if err := sweepProbes(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	<-vmms[left].Done()
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its folder is left: %v", err)
	}
	select {
	case <-vmms[running].Done():
		t.Error("a probe that runs was ended")
	default:
	}
}
