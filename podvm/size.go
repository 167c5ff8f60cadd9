package podvm

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/vmm"
)

// guestMemory is what the guest's kernel, agent and crun need beside the pod's containers, in bytes.
const guestMemory = 64 << 20

// limits are the resources of the pod's containers that have not ended, but for one.
func (p *Pod) limits(except string) []Resources {
	var all []Resources
	for _, c := range p.Containers() {
		if r := c.record.now(); r.ID != except && r.State != Exited {
			all = append(all, r.Config.Resources)
		}
	}
	return all
}

// fit gives the VM the size that these containers may use. What it can't reach upwards is an error;
// a guest that can't give back is not.
func (p *Pod) fit(ctx context.Context, config PodConfig, containers []Resources) error {
	return p.resize(ctx, p.sizeFor(config, containers))
}

// grow makes room for one more container. It takes nothing away: an init container's memory is soon
// wanted again, and plugging it takes time.
func (p *Pod) grow(ctx context.Context, more Resources) error {
	return p.growTo(ctx, p.sizeFor(p.record.now().Config, append(p.limits(""), more)))
}

func (p *Pod) growTo(ctx context.Context, want vmm.Size) error {
	v := p.machine()
	if v == nil {
		return p.notReady()
	}
	now := v.Info().Size
	return p.resize(ctx, vmm.Size{CPUs: max(want.CPUs, now.CPUs), Memory: max(want.Memory, now.Memory)})
}

func (p *Pod) resize(ctx context.Context, want vmm.Size) error {
	v := p.machine()
	if v == nil {
		return p.notReady()
	}
	if want == v.Info().Size {
		return nil
	}
	reached, err := v.Resize(ctx, want)
	if err != nil {
		return err
	}
	if reached.CPUs < want.CPUs || reached.Memory < want.Memory {
		return fmt.Errorf("the VM reached %d vCPUs and %d MiB of %d and %d: %w",
			reached.CPUs, reached.Memory>>20, want.CPUs, want.Memory>>20, errdefs.ErrResourceExhausted)
	}
	return nil
}

// sizeFor is the size of the VM for what the pod as a whole may use, where that is known, or else
// for the sum of its containers: never less than it was started with, which is also what a pod
// without limits gets, and never more than it can be.
func (p *Pod) sizeFor(pod PodConfig, containers []Resources) vmm.Size {
	least, most := p.m.o.Size, p.record.now().VM.Max
	var memory int64
	var cpus float64
	if r := pod.Resources; r != nil && (r.Memory > 0 || r.CPUQuota > 0) {
		memory, cpus = r.Memory, r.cpus()
	} else {
		for _, r := range containers {
			memory += max(r.Memory, 0)
			cpus += r.cpus()
		}
	}
	if memory > 0 {
		own := int64(guestMemory)
		if pod.Overhead != nil {
			own = max(own, pod.Overhead.Memory)
		}
		memory += own
	}
	whole := int(cpus)
	if float64(whole) < cpus {
		whole++
	}
	return vmm.Size{
		CPUs:   min(max(whole, least.CPUs), most.CPUs),
		Memory: min(max(memory, least.Memory), most.Memory),
	}
}

// defaultPeriod is that of a CPU quota without one, in microseconds.
const defaultPeriod = 100_000

// cpus is how many CPUs the quota is; 0 where there is none.
func (r Resources) cpus() float64 {
	if r.CPUQuota <= 0 {
		return 0
	}
	period := r.CPUPeriod
	if period <= 0 {
		period = defaultPeriod
	}
	return float64(r.CPUQuota) / float64(period)
}
