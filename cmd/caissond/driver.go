package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/cloudhv"
	"github.com/caisson-vm/caisson/podvm/vmm/qemu"
)

// program is a driver as it is found on this node.
type program interface {
	vmm.Driver
	Binary() string
	Version() string
	// MaxCPUs is how many vCPUs a VM can have at most.
	MaxCPUs() int
	// KVM tells whether VMs run by KVM, or by emulation.
	KVM() bool
}

// accelerator names how VMs run, for operators.
func accelerator(p program) string {
	if p.KVM() {
		return "kvm"
	}
	return "emulation"
}

// device is what VMs are run with, and mendDevice what to do where it is missing or does not work.
const (
	device     = "/dev/kvm"
	mendDevice = "enable virtualization in the firmware (of a node that is a VM: in its host, nested), and load kvm_intel or kvm_amd"
)

// choice is the driver for new pods, why it was taken, and all that can attach to old ones.
type choice struct {
	driver program
	reason string
	all    map[string]vmm.Driver
}

// chooseDriver takes the configured driver, or the best that works here: Cloud Hypervisor with KVM,
// QEMU with KVM, QEMU by emulation. A driver that can't launch VMs still attaches to those that run. With afresh
// what is known of KVM from before is not believed.
func chooseDriver(ctx context.Context, c Config, g guestimage.Files, afresh bool) (choice, error) {
	hv, hvErr := cloudhv.New(ctx, c.VM.CloudHV)
	if hvErr != nil {
		var err error
		if hv, err = cloudhv.AttachOnly(hvErr); err != nil {
			return choice{}, err
		}
	} else if c.Driver == "auto" {
		hvErr = probe(ctx, c, g, hv, afresh)
	}
	takeHV := hvErr == nil && c.Driver != qemu.Name
	accel, kvmErr := qemu.TCG, error(nil)
	if !takeHV && c.Driver != cloudhv.Name {
		if kvmErr = probeQEMU(ctx, c, g, afresh); kvmErr == nil {
			accel = qemu.KVM
		}
	}
	q, qErr := qemu.New(ctx, c.VM.QEMU, accel)
	if qErr != nil {
		q = qemu.AttachOnly(qErr)
	}
	because := "it is configured"
	if c.Driver == "auto" {
		because = "it and KVM work"
	}
	found := choice{driver: q, all: map[string]vmm.Driver{hv.Name(): hv, q.Name(): q}}
	switch {
	case takeHV:
		found.driver, found.reason = hv, because
	case c.Driver == cloudhv.Name:
		return found, hvErr
	case qErr != nil && c.Driver == qemu.Name:
		return found, qErr
	case qErr != nil:
		return found, fmt.Errorf("no VMM works: %w; %w", hvErr, qErr)
	case kvmErr != nil:
		found.reason = fmt.Sprintf("by emulation, because KVM does not work: %v", oneLine(kvmErr))
	case c.Driver == "auto":
		found.reason = fmt.Sprintf("KVM works, Cloud Hypervisor does not: %v", oneLine(hvErr))
	default:
		found.reason = because
	}
	return found, nil
}

func oneLine(err error) string {
	text, _, _ := strings.Cut(err.Error(), "; the guest's console ends")
	return strings.ReplaceAll(text, "\n", "; ")
}

func probeQEMU(ctx context.Context, c Config, g guestimage.Files, afresh bool) error {
	q, err := qemu.New(ctx, c.VM.QEMU, qemu.KVM)
	if err != nil {
		return err
	}
	return probe(ctx, c, g, q, afresh)
}
