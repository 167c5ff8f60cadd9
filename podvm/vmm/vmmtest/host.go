package vmmtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/vmm"
)

// refusals are what a driver refuses whatever its guest does. The VM has a disk of the serial given.
func refusals(t *testing.T, v vmm.VM, serial, path string) {
	t.Helper()
	ctx := limited(t, callLimit)
	for _, tt := range []struct {
		serial, path string
		want         error
	}{
		{serial, path, errdefs.ErrAlreadyExists},
		{"", path, errdefs.ErrInvalidArgument},
		{strings.Repeat("x", vmm.SerialMax+1), path, errdefs.ErrInvalidArgument},
		{"a,b", path, errdefs.ErrInvalidArgument},
		{"nowhere", filepath.Join(t.TempDir(), "none"), nil},
	} {
		_, err := v.AddDisk(ctx, vmm.Disk{Serial: tt.serial, Path: tt.path, ReadOnly: true})
		if err == nil || tt.want != nil && !errors.Is(err, tt.want) {
			t.Errorf("add disk %q of %s: got %v, want %v", tt.serial, tt.path, err, tt.want)
		}
	}
	for _, name := range []string{"unknown", "nowhere"} {
		if err := v.RemoveDisk(ctx, name); !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("remove disk %q: got %v, want %v", name, err, errdefs.ErrNotFound)
		}
	}
	before := v.Info().Size
	for _, size := range []vmm.Size{
		{CPUs: maxSize.CPUs + 1, Memory: before.Memory}, {CPUs: before.CPUs, Memory: maxSize.Memory + 1}, {CPUs: 0, Memory: before.Memory},
	} {
		if got, err := v.Resize(ctx, size); !errors.Is(err, errdefs.ErrOutOfRange) || got != before {
			t.Errorf("resize to %v: got %v, %v, want %v, %v", size, got, err, before, errdefs.ErrOutOfRange)
		}
	}
}

// gone sees that a VM has ended for good: within a moment, with a reason, and nothing of it left but
// its logs. serial is that of a disk it had.
func gone(t *testing.T, d vmm.Driver, c vmm.Config, v vmm.VM, serial, path string, reason ...string) {
	t.Helper()
	select {
	case <-v.Done():
	case <-time.After(endLimit):
		t.Fatal("the VM has not ended")
	}
	err := v.Info().Err
	if err == nil {
		t.Fatal("the VM ended without a reason")
	}
	for _, word := range reason {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("the VM ended with %q, want %q in it", err, word)
		}
	}
	onlyLogs(t, c)
	unusable(t, v, serial, path)
	ctx := limited(t, callLimit)
	if _, err := d.Attach(ctx, c); !errors.Is(err, vmm.ErrGone) {
		t.Errorf("attach: got %v, want %v", err, vmm.ErrGone)
	}
	for range 2 {
		if err := v.Kill(ctx); err != nil {
			t.Errorf("kill what has ended: %v", err)
		}
	}
}

// onlyLogs sees that a VM left nothing else in its folder.
func onlyLogs(t *testing.T, c vmm.Config) {
	t.Helper()
	left, err := os.ReadDir(c.Dir)
	if err != nil {
		t.Error(err)
	}
	for _, e := range left {
		if !strings.HasSuffix(e.Name(), ".log") {
			t.Errorf("left behind: %s", e.Name())
		}
	}
}

// unusable sees that all methods of a VM that has ended say so, at once.
func unusable(t *testing.T, v vmm.VM, serial, path string) {
	t.Helper()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	ctx, start := limited(t, callLimit), time.Now()
	for name, do := range map[string]func() error{
		"dial": func() error { _, err := v.Dial(ctx, vmm.AgentPort); return err },
		"add disk": func() error {
			_, err := v.AddDisk(ctx, vmm.Disk{Serial: "late", Path: path, ReadOnly: true})
			return err
		},
		"remove disk": func() error { return v.RemoveDisk(ctx, serial) },
		"add network card": func() error {
			return v.AddNIC(ctx, vmm.NIC{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 9}, Tap: null})
		},
		"resize": func() error { _, err := v.Resize(ctx, maxSize); return err },
	} {
		if err := do(); !errors.Is(err, vmm.ErrGone) {
			t.Errorf("%s: got %v, want %v", name, err, vmm.ErrGone)
		}
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("that it has ended took %v to tell", took)
	}
}

// processGone sees that a process has ended.
func processGone(t *testing.T, pid int) {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return
	}
	// What is left of one that is not ours goes when its parent looks.
	if _, after, ok := strings.Cut(string(stat), ") "); !ok || !strings.HasPrefix(after, "Z") {
		t.Errorf("process %d runs: %s", pid, stat)
	}
}

// impatient sees that none of a VM's methods blocks beyond its context.
func impatient(t *testing.T, v vmm.VM, path string) (dialled error) {
	t.Helper()
	const patience = time.Second
	for name, do := range map[string]func(context.Context) error{
		"dial": func(ctx context.Context) error { _, dialled = v.Dial(ctx, vmm.AgentPort); return dialled },
		"add disk": func(ctx context.Context) error {
			_, err := v.AddDisk(ctx, vmm.Disk{Serial: "slow", Path: path, ReadOnly: true})
			return err
		},
		"resize": func(ctx context.Context) error { _, err := v.Resize(ctx, maxSize); return err },
	} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		start := time.Now()
		err := do(ctx)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: got %v, want %v", name, err, context.DeadlineExceeded)
		}
		if took := time.Since(start); took > patience+4*time.Second {
			t.Errorf("%s with a limit of %v took %v", name, patience, took)
		}
	}
	return dialled
}
