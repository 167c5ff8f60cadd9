package podvm

import (
	"context"
	"fmt"
	"runtime"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/vmm"
)

// guestMemory is what the guest's kernel, agent and crun need beside the pod's containers, in bytes.
const guestMemory = 64 << 20

// fit gives the VM the size that the pod's containers may use.
func (p *Pod) fit(ctx context.Context) error {
	return p.resizeFor(ctx, p.Containers(), Resources{}, false)
}

// grow makes room for a container that is about to be created.
func (p *Pod) grow(ctx context.Context, r Resources) error {
	return p.resizeFor(ctx, p.Containers(), r, true)
}

// growWithout makes room for a container's new resources in the place of its old.
func (p *Pod) growWithout(ctx context.Context, id string, r Resources) error {
	var others []*Container
	for _, c := range p.Containers() {
		if c.id != id {
			others = append(others, c)
		}
	}
	return p.resizeFor(ctx, others, r, true)
}

// resizeFor resizes the VM for these containers, and one more. What the VM can't reach upwards is
// an error; a guest that can't give back is not.
func (p *Pod) resizeFor(ctx context.Context, containers []*Container, more Resources, isMore bool) error {
	v := p.machine()
	if v == nil {
		return p.notReady()
	}
	p.mu.Lock()
	config := p.record.Config
	p.mu.Unlock()
	all := []Resources{}
	for _, c := range containers {
		if s := c.Status(); s.State != Exited {
			all = append(all, s.Config.Resources)
		}
	}
	if isMore {
		all = append(all, more)
	}
	want := p.m.sizeFor(config, all)
	now := v.Info().Size
	if want == now {
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

// sizeFor is the size of a VM for what the pod as a whole may use, where that is known, or else for
// the sum of its containers. Where a limit is missing the configured size stands in for it.
func (m *Manager) sizeFor(pod PodConfig, containers []Resources) vmm.Size {
	var total Resources
	if pod.Resources != nil && (pod.Resources.Memory > 0 || pod.Resources.CPUQuota > 0) {
		total = *pod.Resources
	} else {
		total = sum(containers)
	}
	size := m.o.Size
	if n := cpus(total); n > 0 {
		size.CPUs = n
	}
	if total.Memory > 0 {
		size.Memory = max(size.Memory, total.Memory+guestMemory)
		if pod.Overhead != nil {
			size.Memory = max(size.Memory, total.Memory+pod.Overhead.Memory)
		}
	}
	size.CPUs = min(max(size.CPUs, m.o.Size.CPUs), m.o.Max.CPUs)
	size.Memory = min(size.Memory, m.o.Max.Memory)
	return size
}

// sum adds limits up; one that is missing makes the sum unlimited (zero).
func sum(all []Resources) Resources {
	var total Resources
	memory, cpu := len(all) > 0, len(all) > 0
	const period = 100_000
	for _, r := range all {
		memory = memory && r.Memory > 0
		cpu = cpu && r.CPUQuota > 0
		total.Memory += max(r.Memory, 0)
		if r.CPUQuota > 0 {
			total.CPUQuota += r.CPUQuota * period / max(r.CPUPeriod, 1)
		}
	}
	total.CPUPeriod = period
	if !memory {
		total.Memory = 0
	}
	if !cpu {
		total.CPUQuota = 0
	}
	return total
}

// cpus is how many vCPUs a quota is, rounded up; 0 where there is none.
func cpus(r Resources) int {
	if r.CPUQuota <= 0 {
		return 0
	}
	period := r.CPUPeriod
	if period <= 0 {
		period = 100_000
	}
	return min(int((r.CPUQuota+period-1)/period), runtime.NumCPU())
}
