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
		"VMM ended": {fmt.Errorf("dial: %w: killed", vmm.ErrGone), false},
		"too slow":  {fmt.Errorf("the guest has not come up: %w", context.DeadlineExceeded), false},
		"hopeless":  {fmt.Errorf("%w: %w", errHopeless, vmm.ErrGone), true},
		"no hope":   {fmt.Errorf("%w: %w", errHopeless, context.DeadlineExceeded), true},
		"no memory": {errors.New("cannot allocate memory"), false},
	} {
		t.Run(name, func(t *testing.T) {
			path, calls := filepath.Join(t.TempDir(), "probe.json"), 0
			ask := func(key string) {
				t.Helper()
				err := remembered(path, key, false, func() error { calls++; return c.err })
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

// TestProbeAfresh: who asks afresh has the answer of now, and so has who asks next.
func TestProbeAfresh(t *testing.T) {
	const key = "qemu /usr/bin/qemu 7"
	no := fmt.Errorf("%w: no", errHopeless)
	for name, c := range map[string]struct{ before, now error }{
		"mended":                 {no, nil},
		"broken":                 {nil, no},
		"broken, for now":        {nil, context.DeadlineExceeded},
		"not known, broken once": {vmm.ErrGone, vmm.ErrGone},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "probe.json")
			says := c.before
			ask := func(afresh bool, want error) {
				t.Helper()
				if err := remembered(path, key, afresh, func() error { return says }); (err == nil) != (want == nil) {
					t.Errorf("got %v, want %v", err, want)
				}
			}
			ask(false, c.before)
			says = c.now
			ask(true, c.now)
			ask(false, c.now)
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
