package vmmtest

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// RunKVM is Run for a driver that needs KVM. Where KVM does not work the test is skipped, and what says
// so names it. That /dev/kvm opens proves nothing: as the daemon does, a guest is booted.
func RunKVM(t *testing.T, newDriver func(t *testing.T) vmm.Driver, g guestimage.Files) {
	if !Owner() {
		if err := kvmWorks(t, newDriver, g); err != nil {
			t.Skipf("SKIPPED: the contract of VM drivers was not tested with %s, because KVM does not work here: %v", newDriver(t).Name(), err)
		}
	}
	Run(t, newDriver, g)
}

// kvmWorks boots a guest, unless it is plain that it can't.
func kvmWorks(t *testing.T, newDriver func(t *testing.T) vmm.Driver, g guestimage.Files) error {
	t.Helper()
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return err
	}
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err
	}
	if flags := strings.Fields(string(cpu)); !slices.Contains(flags, "vmx") && !slices.Contains(flags, "svm") {
		return errors.New("/dev/kvm is there, but the CPU offers neither VMX nor SVM")
	}
	s := &suite{newDriver: newDriver, guest: g}
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	v, err := newDriver(t).Launch(ctx, s.config(t, "probe"))
	if err != nil {
		return err
	}
	conn, err := v.Dial(ctx, vmm.AgentPort)
	if err == nil {
		conn.Close()
	}
	return errors.Join(err, v.Kill(context.WithoutCancel(ctx)))
}
