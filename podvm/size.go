package podvm

import (
	"context"
	"fmt"
	"log/slog"
	"math"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/vmm"
)

// guestMemory is what the guest's kernel, agent and crun need beside the pod's containers, in bytes.
const guestMemory = 64 << 20

// descriptors is the part of a guest's memory in which its kernel describes the pages, 64 bytes for each. Of what is
// plugged in, it takes that from the rest.
const descriptors = 64

// withGuest is what a pod's containers may use, in bytes, with what the guest needs beside them, or with the pod's
// overhead where that leaves more: a part of it is for the VMM.
func (c PodConfig) withGuest(memory int64) int64 {
	need := memory + guestMemory
	need += need / (descriptors - 1)
	if c.Overhead != nil {
		all := memory + c.Overhead.Memory
		return max(need, all-vmmMemory(all))
	}
	return need
}

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

// fit gives the VM the size that these containers may use, as far as it can be. What it can't reach
// upwards is an error; a guest that can't give back is not.
func (p *Pod) fit(ctx context.Context, config PodConfig, containers []Resources) error {
	p.makeRoom(config)
	return p.resize(ctx, p.within(p.sizeFor(config, containers)))
}

// grow makes room for one more container. It takes nothing away: an init container's memory is soon
// wanted again, and plugging it takes time.
func (p *Pod) grow(ctx context.Context, more Resources) error {
	return p.growTo(ctx, p.within(p.sizeFor(p.record.now().Config, append(p.limits(""), more))))
}

// within is a size cut to what the VM can be: a limit may well be above all that the node has.
func (p *Pod) within(want vmm.Size) vmm.Size {
	most := p.record.now().VM.Most()
	got := vmm.Size{CPUs: min(want.CPUs, most.CPUs), Memory: min(want.Memory, most.Memory)}
	if got != want {
		slog.Info("limits are above what the VM can have", "pod", p.id, "cpus", want.CPUs, "most_cpus", most.CPUs, "mib", want.Memory>>20, "most_mib", most.Memory>>20)
	}
	return got
}

// clonable tells whether a clone can have the memory that the limits of this pod are. A clone can also where nothing
// else could.
func (m *Manager) clonable(c PodConfig) bool {
	clone := vmm.Config{Size: m.o.Size, Max: m.o.MaxClone}.Most().Memory
	memory, _ := memoryFor(c, nil)
	return memory <= clone || clone >= vmm.Config{Size: m.o.Size, Max: m.o.Max}.Most().Memory
}

// allow refuses a change to more than the VM can have; what was above that before may stay.
func (p *Pod) allow(before, want vmm.Size) error {
	v := p.record.now().VM
	most := v.Most()
	if want.CPUs > max(most.CPUs, before.CPUs) {
		return fmt.Errorf("%d vCPUs, and the pod can have %d at most: raise vm.max_cpus, which holds for new pods: %w", want.CPUs, most.CPUs, errdefs.ErrOutOfRange)
	}
	if want.Memory > max(most.Memory, before.Memory) {
		key := "vm.max_memory"
		if v.Template != "" && p.m.o.MaxClone.Memory < p.m.o.Max.Memory {
			key = "vm.max_clone_memory"
		}
		return fmt.Errorf("%d MiB of memory with the guest's own, and the pod can have %d at most: raise %s, which holds for new pods: %w", want.Memory>>20, most.Memory>>20, key, errdefs.ErrOutOfRange)
	}
	return nil
}

func (p *Pod) growTo(ctx context.Context, want vmm.Size) error {
	v := p.machine()
	if v == nil {
		return p.notReady()
	}
	p.makeRoom(p.record.now().Config)
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

// sizeFor is the size of the VM for what the pod as a whole may use, of memory and of CPUs, where that
// is known, or else for the sum of its containers: never less than it was started with, which is also
// what a pod without limits gets. Limits may be more than the VM can have; what is wanted beyond them is not.
func (p *Pod) sizeFor(pod PodConfig, containers []Resources) vmm.Size {
	least, vm := p.m.o.Size, p.record.now().VM
	limit, wanted := cpusFor(pod, containers)
	cpus := max(limit, min(wanted, vm.Most().CPUs))
	memory, open := memoryFor(pod, containers)
	if memory > 0 && open > 0 && !memoryCapped(vm.Cgroup) {
		memory = max(memory, min(memory+open*least.Memory, vm.Most().Memory))
	}
	return vmm.Size{CPUs: max(cpus, least.CPUs), Memory: max(memory, least.Memory)}
}

// cpusFor is how many CPUs the limits are, and how many may be wanted. For a pod as a whole the kubelet adds up
// the limits that are set, and all requests; where a container has no limit, the pod may use more than
// either, and what each container may use counts as well.
func cpusFor(pod PodConfig, containers []Resources) (limit, wanted int) {
	var limits, all float64
	open := false
	for _, r := range containers {
		limits += r.quota()
		all += r.cpus()
		open = open || r.quota() == 0
	}
	if r := pod.Resources; r != nil {
		if q := r.quota(); q > 0 {
			limits = q
			if !open { // the limit of the kubelet's cgroup, too
				all = 0
			}
		}
		all = max(all, r.cpus())
	}
	return int(math.Ceil(limits)), int(math.Ceil(all))
}

// memoryFor is the memory that the limits are, with the guest's own, 0 where there is none, and how many
// containers have no limit. Each of those wants what a pod without limits gets.
func memoryFor(pod PodConfig, containers []Resources) (memory, open int64) {
	for _, r := range containers {
		memory += max(r.Memory, 0)
		if r.Memory <= 0 {
			open++
		}
	}
	if r := pod.Resources; r != nil && r.Memory > 0 {
		memory = r.Memory
	}
	if memory == 0 {
		return 0, open
	}
	return pod.withGuest(memory), open
}

// sizeAfter is sizeFor when a container's limits change. Where they rise, what was said of the pod as a
// whole was said before that, and the containers count too.
func (p *Pod) sizeAfter(c *Container, limits Resources) vmm.Size {
	pod, old, all := p.record.now().Config, c.record.now().Config.Resources, append(p.limits(c.id), limits)
	size := p.sizeFor(pod, all)
	pod.Resources = nil
	sum := p.sizeFor(pod, all)
	if limits.Memory > old.Memory {
		size.Memory = max(size.Memory, sum.Memory)
	}
	if limits.cpus() > old.cpus() {
		size.CPUs = max(size.CPUs, sum.CPUs)
	}
	return size
}

// defaultPeriod is that of a CPU quota without one, in microseconds.
const defaultPeriod = 100_000

// sharesPerCPU are those of a request for one CPU. minShares is the least that there can be, which the
// kubelet gives where nothing is requested.
const sharesPerCPU, minShares = 1024, 2

// cpus is how many CPUs are meant: those of the quota, or what is requested where that is more, as it is
// where there is no quota, because nobody set one or because the CPUs are exclusive. 0 where nothing is said.
func (r Resources) cpus() float64 {
	if r.CPUShares <= minShares {
		return r.quota()
	}
	return max(r.quota(), float64(r.CPUShares)/sharesPerCPU)
}

// quota is how many CPUs the quota is; 0 where there is none.
func (r Resources) quota() float64 {
	if r.CPUQuota <= 0 {
		return 0
	}
	period := r.CPUPeriod
	if period <= 0 {
		period = defaultPeriod
	}
	return float64(r.CPUQuota) / float64(period)
}
