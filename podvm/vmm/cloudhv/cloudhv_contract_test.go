package cloudhv

import (
	"testing"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/vmmtest"
)

// TestContract needs Cloud Hypervisor in PATH and a KVM that works.
func TestContract(t *testing.T) {
	newDriver := func(t *testing.T) vmm.Driver {
		d, err := New(t.Context(), "cloud-hypervisor")
		if err != nil {
			t.Skipf("SKIPPED: the contract of VM drivers was not tested with Cloud Hypervisor: %v", err)
		}
		t.Cleanup(func() { d.Close() })
		return d
	}
	newDriver(t) // without a VMM no guest is looked for
	vmmtest.RunKVM(t, newDriver, vmmtest.Guest(t))
}
