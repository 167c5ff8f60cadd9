package vmmtest

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/podvm/vmm"
)

// freed has the guest use memory and free it: the host gets it back, though the VM keeps its size.
func freed(t *testing.T, v vmm.VM, g *guest) {
	const size = 96 * mib
	ctx := limited(t, callLimit)
	before := resident(t, v)
	if err := call(ctx, g.Client, "Fill", size, nil); err != nil {
		t.Fatal(err)
	}
	full := resident(t, v)
	if full < before+size*3/4 {
		t.Fatalf("the VMM has %d MiB after the guest wrote to %d, and had %d before", full/mib, size/mib, before/mib)
	}
	if err := call(ctx, g.Client, "Free", struct{}{}, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the host has the guest's free memory back", func() error {
		if now := resident(t, v); now > full-size*3/4 {
			return fmt.Errorf("the VMM has %d MiB, and had %d before its guest freed %d", now/mib, full/mib, size/mib)
		}
		return nil
	})
}

// resident is the memory of the VMM's process, in bytes.
func resident(t *testing.T, v vmm.VM) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.Info().PID))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	var kib int64
	if _, err := fmt.Sscanf(rest, "%d kB", &kib); err != nil {
		t.Fatalf("status of the VMM: %v", err)
	}
	return kib << 10
}
