package qemu_test

import (
	"testing"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/qemu"
	"github.com/caisson-vm/caisson/podvm/vmm/vmmtest"
)

func TestMain(m *testing.M) { vmmtest.Main(m) }

// TestContract runs by emulation, which works everywhere.
func TestContract(t *testing.T) {
	g := vmmtest.Guest(t)
	// Emulated on a busy machine the TSC is not what the kernel measures it to be.
	g.Cmdline += " tsc=unstable"
	vmmtest.Run(t, func(t *testing.T) vmm.Driver {
		d, err := qemu.New(t.Context(), "qemu-system-x86_64", qemu.TCG)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}, g)
}
