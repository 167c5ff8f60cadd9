package podvm

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/vmm"
)

// The node of these tests gives a pod 4 vCPUs and 4 GiB, and 5 MiB that make no block of memory.
const tooMuch = 16 << 30

func (n *node) size() vmm.Size { return n.driver.VMs()[0].Info().Size }

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
	if err := p.Update(soon(t), nil, &Resources{Memory: 4<<30 - guestMemory}); err != nil {
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
	if s := n.size(); s != (vmm.Size{CPUs: 1, Memory: 512<<20 + guestMemory}) {
		t.Errorf("the pod's limits do not hold: %+v", s)
	}
	if err := c.Update(soon(t), Resources{CPUShares: 5}); err != nil {
		t.Fatal(err)
	}
	if s := n.size(); s.Memory != 512<<20+guestMemory {
		t.Errorf("for other things than limits the VM became %+v", s)
	}
	if err := c.Update(soon(t), Resources{Memory: 600 << 20, CPUQuota: 150_000}); err != nil {
		t.Fatal(err)
	}
	if s := n.size(); s != (vmm.Size{CPUs: 3, Memory: 1000<<20 + guestMemory}) {
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
	if s := n.size(); s != (vmm.Size{CPUs: 2, Memory: 1<<30 + guestMemory}) {
		t.Errorf("the VM has %+v", s)
	}
}
