package podvm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/vmm"
)

// The node of these tests gives a pod 4 vCPUs and 4 GiB, and 5 MiB that make no block of memory.
const tooMuch = 16 << 30

func (n *node) size() vmm.Size { return n.driver.VMs()[0].Info().Size }

// withGuest is what a VM has for these limits: what its guest needs, and a 63rd, which is a 64th of the sum.
func withGuest(limit int64) int64 { return (limit + 64<<20) + (limit+64<<20)/63 }

// mostOf are the limits that such a VM can have.
func mostOf(vm int64) int64 { return vm - vm/64 - 64<<20 }

// TestAllOfTheLimit: what the guest does not take for itself is the limit at least, also where much of it is
// plugged in, which takes a 64th of that in descriptors of pages, or is in a VM of a pod that has an overhead.
func TestAllOfTheLimit(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	for _, mib := range []int64{32, 256, 1000, 4096, 16 << 10, 1 << 20} {
		limit := mib << 20
		for _, overhead := range []*Resources{nil, {}, {Memory: 64 << 20}, {Memory: 1 << 30}} {
			config := PodConfig{Resources: &Resources{Memory: limit}, Overhead: overhead}
			size := p.sizeFor(config, nil).Memory
			left := size - (size-n.o.Size.Memory)/64 - 64<<20
			if most := limit + limit/1000 + max(n.o.Size.Memory, 1<<30); left < limit || left > most {
				t.Errorf("of a limit of %d MiB, with an overhead of %v, there are %d", mib, overhead, left>>20)
			}
			if room := p.room(config); room < size+vmmMemory(size) {
				t.Errorf("for a limit of %d MiB, with an overhead of %v, there is room for %d of %d MiB", mib, overhead, room>>20, size>>20)
			}
		}
	}
}

// TestLimitsAboveTheNode: such a pod starts, with all there is, and so do its containers.
func TestLimitsAboveTheNode(t *testing.T) {
	n := newNode(t)
	config := podConfig("web")
	config.Resources = &Resources{Memory: tooMuch, CPUQuota: 6_400_000}
	p := n.pod(config)
	if s := n.size(); s != (vmm.Size{CPUs: 4, Memory: 4 << 30}) {
		t.Errorf("the pod has %+v", s)
	}
	main := containerConfig("main")
	main.Resources = Resources{Memory: tooMuch, CPUQuota: 6_400_000}
	c := n.running(p, main)
	// What is above stays there, and may go down, as a whole or in part.
	for _, r := range []Resources{{CPUShares: 5}, {Memory: tooMuch - 1}, {CPUQuota: 800_000}} {
		if err := c.Update(soon(t), r); err != nil {
			t.Errorf("%+v: %v", r, err)
		}
	}
	if err := p.Update(soon(t), nil, &Resources{Memory: tooMuch - 1, CPUQuota: 800_000}); err != nil {
		t.Error(err)
	}
	if err := p.Update(soon(t), nil, &Resources{Memory: tooMuch, CPUQuota: 800_000}); !errdefs.IsOutOfRange(err) {
		t.Errorf("up again: %v", err)
	}
}

// TestUpdateBeyondTheNode is refused, for the kubelet takes that for a veto, and changes nothing.
func TestUpdateBeyondTheNode(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	c := n.running(p, containerConfig("main"))
	before := n.size()
	for key, r := range map[string]Resources{"vm.max_memory": {Memory: 4 << 30}, "vm.max_cpus": {CPUQuota: 450_000}} {
		for what, err := range map[string]error{"pod": p.Update(soon(t), nil, &r), "container": c.Update(soon(t), r)} {
			if !errdefs.IsOutOfRange(err) || !strings.Contains(err.Error(), key) || !strings.Contains(err.Error(), "4") {
				t.Errorf("%s: %v, want %s", what, err, key)
			}
		}
	}
	if s := n.size(); s != before || p.Status().Config.Resources != nil || c.Status().Config.Resources.Memory != 0 {
		t.Errorf("the VM became %+v", s)
	}
	if err := p.Update(soon(t), nil, &Resources{Memory: mostOf(4 << 30)}); err != nil {
		t.Errorf("all there is: %v", err)
	}
}

// TestContainerAboveItsPod: the VM follows a container that is raised above what the pod was said to use.
func TestContainerAboveItsPod(t *testing.T) {
	n := newNode(t)
	config := podConfig("web")
	config.Resources = &Resources{Memory: 512 << 20, CPUQuota: 100_000}
	p := n.pod(config)
	main, side := containerConfig("main"), containerConfig("side")
	main.Resources, side.Resources = Resources{Memory: 400 << 20, CPUQuota: 100_000}, Resources{Memory: 400 << 20, CPUQuota: 100_000}
	c := n.running(p, main)
	n.running(p, side)
	if s := n.size(); s != (vmm.Size{CPUs: 1, Memory: withGuest(512 << 20)}) {
		t.Errorf("the pod's limits do not hold: %+v", s)
	}
	if err := c.Update(soon(t), Resources{CPUShares: 5}); err != nil {
		t.Fatal(err)
	}
	if s := n.size(); s.Memory != withGuest(512<<20) {
		t.Errorf("for other things than limits the VM became %+v", s)
	}
	if err := c.Update(soon(t), Resources{Memory: 600 << 20, CPUQuota: 150_000}); err != nil {
		t.Fatal(err)
	}
	if s := n.size(); s != (vmm.Size{CPUs: 3, Memory: withGuest(1000 << 20)}) {
		t.Errorf("the VM became %+v", s)
	}
}

// TestPodWithOneLimit: what is not said of the pod as a whole is what its containers say.
func TestPodWithOneLimit(t *testing.T) {
	n := newNode(t)
	config := podConfig("web")
	config.Resources = &Resources{CPUQuota: 200_000}
	p := n.pod(config)
	main := containerConfig("main")
	main.Resources = Resources{Memory: 1 << 30, CPUQuota: 100_000}
	n.running(p, main)
	if s := n.size(); s != (vmm.Size{CPUs: 2, Memory: withGuest(1 << 30)}) {
		t.Errorf("the VM has %+v", s)
	}
}

// TestSizeFor: as many CPUs as the pod may use, and memory for containers without a limit, too.
func TestSizeFor(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	const mib = 1 << 20
	start := int64(256 * mib)
	cpu := func(quota, shares int64) Resources {
		return Resources{CPUQuota: quota * 1000, CPUPeriod: 100_000, CPUShares: shares}
	}
	whole := func(r Resources) *Resources { return &r }
	for name, c := range map[string]struct {
		pod        *Resources
		containers []Resources
		want       vmm.Size
	}{
		"nothing":                     {nil, nil, vmm.Size{CPUs: 1, Memory: start}},
		"best effort":                 {whole(cpu(0, 2)), []Resources{cpu(0, 2), cpu(0, 2), cpu(0, 2)}, vmm.Size{CPUs: 1, Memory: start}},
		"requested":                   {whole(cpu(0, 3072)), nil, vmm.Size{CPUs: 3, Memory: start}},
		"requested by a container":    {nil, []Resources{cpu(0, 2500)}, vmm.Size{CPUs: 3, Memory: start}},
		"exclusive":                   {whole(Resources{CPUQuota: -1, CPUPeriod: 100_000, CPUShares: 4096}), []Resources{{CPUQuota: -1, CPUPeriod: 100_000, CPUShares: 4096}}, vmm.Size{CPUs: 4, Memory: start}},
		"more than there is":          {whole(cpu(0, 262144)), []Resources{cpu(0, 262144)}, vmm.Size{CPUs: 4, Memory: start}},
		"limits more than there is":   {whole(cpu(500, 2)), []Resources{cpu(500, 2)}, vmm.Size{CPUs: 5, Memory: start}},
		"limit above the request":     {whole(cpu(200, 100)), []Resources{cpu(200, 100)}, vmm.Size{CPUs: 2, Memory: start}},
		"limit, and nothing":          {whole(cpu(100, 1024)), []Resources{cpu(100, 1024), cpu(0, 2)}, vmm.Size{CPUs: 1, Memory: start}},
		"limit, and a request":        {whole(cpu(200, 1124)), []Resources{cpu(200, 100), cpu(0, 1024)}, vmm.Size{CPUs: 3, Memory: start}},
		"limit of the pod":            {whole(cpu(200, 100)), []Resources{cpu(200, 100), cpu(200, 100)}, vmm.Size{CPUs: 2, Memory: start}},
		"memory":                      {nil, []Resources{{Memory: 512 * mib}}, vmm.Size{CPUs: 1, Memory: withGuest(512 * mib)}},
		"memory, and no limit":        {nil, []Resources{{Memory: 512 * mib}, {}}, vmm.Size{CPUs: 1, Memory: withGuest(512*mib) + start}},
		"memory of the pod, no limit": {whole(Resources{Memory: 512 * mib}), []Resources{{Memory: 512 * mib}, {Memory: -1}, {}}, vmm.Size{CPUs: 1, Memory: withGuest(512*mib) + 2*start}},
		"little, and no limit":        {nil, []Resources{{Memory: 16 * mib}, {}}, vmm.Size{CPUs: 1, Memory: withGuest(16*mib) + start}},
		"no limit at all":             {whole(Resources{Memory: -1}), []Resources{{}, {Memory: -1}}, vmm.Size{CPUs: 1, Memory: start}},
		"all memory, and no limit":    {nil, []Resources{{Memory: 3900 * mib}, {}}, vmm.Size{CPUs: 1, Memory: 4096 * mib}},
		"limit of all, and no limit":  {nil, []Resources{{Memory: tooMuch}, {}}, vmm.Size{CPUs: 1, Memory: withGuest(tooMuch)}},
	} {
		if got := p.sizeFor(PodConfig{Resources: c.pod}, c.containers); got != c.want {
			t.Errorf("%s: got %+v, want %+v", name, got, c.want)
		}
	}
}

// TestExclusiveCPUs: the kubelet gives them without a quota, and the VM has them from the start.
func TestExclusiveCPUs(t *testing.T) {
	n := newNode(t)
	exclusive := Resources{CPUQuota: -1, CPUPeriod: 100_000, CPUShares: 3 * 1024, Memory: 512 << 20}
	config, main := podConfig("database"), containerConfig("main")
	config.Resources, main.Resources = &exclusive, exclusive
	p := n.pod(config)
	want := vmm.Size{CPUs: 3, Memory: withGuest(512 << 20)}
	if s := n.size(); s != want {
		t.Errorf("the pod has %+v", s)
	}
	n.running(p, main)
	if s := n.size(); s != want {
		t.Errorf("its container has %+v", s)
	}
}

// TestUpdateRequest: the VM follows what is requested, and more than there is is no reason to refuse it.
func TestUpdateRequest(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	main, side := containerConfig("main"), containerConfig("side")
	main.Resources = Resources{CPUShares: 512}
	side.Resources = Resources{CPUQuota: 100_000, CPUShares: 512, Memory: 3800 << 20}
	c := n.running(p, main)
	d := n.running(p, side)
	if s := n.size(); s != (vmm.Size{CPUs: 2, Memory: 4 << 30}) {
		t.Errorf("the VM has %+v", s)
	}
	for _, step := range []struct{ shares, want int64 }{{2048, 3}, {5000, 4}} {
		if err := c.Update(soon(t), Resources{CPUShares: step.shares}); err != nil {
			t.Error(err)
		}
		if s := n.size(); s.CPUs != int(step.want) {
			t.Errorf("for %d shares the VM became %+v", step.shares, s)
		}
	}
	if err := p.Update(soon(t), nil, &Resources{CPUShares: 5512}); err != nil {
		t.Error(err)
	}
	// The other one's limits may rise to all there is, whatever this one would use.
	if err := d.Update(soon(t), Resources{CPUQuota: 400_000, Memory: mostOf(4 << 30)}); err != nil {
		t.Error(err)
	}
}

// TestMemoryBelowTheCgroups: a container that comes later, without a limit, does not make a guest larger than
// the cgroup in which its VM is.
func TestMemoryBelowTheCgroups(t *testing.T) {
	n := newNode(t)
	config, main := podConfig("web"), containerConfig("main")
	config.Resources, main.Resources = &Resources{Memory: 512 << 20}, Resources{Memory: 512 << 20}
	p := n.pod(config)
	n.running(p, main)
	dir := t.TempDir()
	if err := p.record.set(func(r *podRecord) { r.VM.Cgroup = filepath.Join(dir, "vm") }); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		limit string
		want  int64
	}{{"536870912\n", withGuest(512 << 20)}, {"max\n", withGuest(512<<20) + 512<<20}} {
		if err := os.WriteFile(filepath.Join(dir, "memory.max"), []byte(c.limit), 0o600); err != nil {
			t.Fatal(err)
		}
		n.running(p, containerConfig(fmt.Sprint("debug", i)))
		if s := n.size(); s.Memory != c.want {
			t.Errorf("in a cgroup of %q the VM has %+v", c.limit, s)
		}
	}
}
