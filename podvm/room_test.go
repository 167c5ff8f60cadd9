package podvm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// inCgroup puts the pod into a folder that stands for the kubelet's cgroup, with these files.
func (n *node) inCgroup(p *Pod, files map[string]string) (dir string) {
	n.t.Helper()
	dir = n.t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			n.t.Fatal(err)
		}
	}
	if err := p.record.set(func(r *podRecord) { r.VM.Cgroup = filepath.Join(dir, "caisson-x") }); err != nil {
		n.t.Fatal(err)
	}
	return dir
}

// roomFor is what a VM of this size and what serves it take, in whole pages.
func roomFor(guest int64) string {
	return fmt.Sprint((guest + 32<<20 + guest/128 + 4095) / 4096 * 4096)
}

// TestMakeRoom: the kubelet's limit becomes what the VM needs at most; other limits stay.
func TestMakeRoom(t *testing.T) {
	const mib = 1 << 20
	n := newNode(t)
	p := n.pod(podConfig("web"))
	for name, c := range map[string]struct {
		limit, overhead int64
		now, want       string
	}{
		"the kubelet's":                      {256 * mib, 0, fmt.Sprintln(256 * mib), roomFor(withGuest(256 * mib))},
		"with an overhead that is all of it": {256 * mib, 128 * mib, fmt.Sprintln(384 * mib), fmt.Sprintln(384 * mib)},
		"less than the VM has at least":      {64 * mib, 0, fmt.Sprintln(64 * mib), roomFor(256 * mib)},
		"with less overhead than it is":      {256 * mib, 32 * mib, fmt.Sprintln(288 * mib), roomFor(withGuest(256 * mib))},
		"of a large pod":                     {16 << 30, 0, fmt.Sprintln(16 << 30), roomFor(withGuest(16 << 30))},
		"no whole pages":                     {256*mib + 1, 0, fmt.Sprintln(256 * mib), roomFor(withGuest(256*mib + 1))},
		"somebody's, who wants less":         {256 * mib, 0, fmt.Sprintln(200 * mib), fmt.Sprintln(200 * mib)},
		"somebody's, who allows more":        {256 * mib, 0, fmt.Sprintln(2048 * mib), fmt.Sprintln(2048 * mib)},
		"none":                               {256 * mib, 0, "max\n", "max\n"},
		"the pod has none":                   {0, 0, fmt.Sprintln(256 * mib), fmt.Sprintln(256 * mib)},
	} {
		dir := n.inCgroup(p, map[string]string{"memory.max": c.now, "memory.high": "max\n"})
		config := podConfig("web")
		config.Resources, config.Overhead = &Resources{Memory: c.limit}, &Resources{Memory: c.overhead}
		p.makeRoom(config)
		if got, err := os.ReadFile(filepath.Join(dir, "memory.max")); err != nil || string(got) != c.want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, c.want)
		}
		if got, err := readLimit(filepath.Join(dir, "memory.high")); err != nil || got != unlimited {
			t.Errorf("%s: memory.high is %d, %v", name, got, err)
		}
	}
	dir := n.inCgroup(p, map[string]string{"memory.max": fmt.Sprintln(256 * mib), "memory.high": fmt.Sprintln(192 * mib)})
	config := podConfig("web")
	config.Resources = &Resources{Memory: 256 * mib}
	p.makeRoom(config)
	if got, err := readLimit(filepath.Join(dir, "memory.high")); err != nil || got != p.room(config) {
		t.Errorf("where the kubelet has containers slowed down, the VM is from %d on, %v; want %d", got, err, p.room(config))
	}
}

// TestUpdateAfterRoom: where the kubelet changes nothing but CPUs, it says of memory what makeRoom has made of it.
func TestUpdateAfterRoom(t *testing.T) {
	const mib = 1 << 20
	for _, overhead := range []int64{0, 128 * mib} {
		n := newNode(t)
		config := podConfig("web")
		config.Resources, config.Overhead = &Resources{Memory: 256 * mib}, &Resources{Memory: overhead}
		p := n.pod(config)
		dir := n.inCgroup(p, map[string]string{"memory.max": fmt.Sprintln(256*mib + overhead), "memory.high": "max\n"})
		p.makeRoom(config)
		var sizes []int64
		for range 3 {
			max, err := readLimit(filepath.Join(dir, "memory.max"))
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Update(soon(t), nil, &Resources{Memory: max - overhead, CPUQuota: 200000, CPUPeriod: 100000}); err != nil {
				t.Fatal(err)
			}
			sizes = append(sizes, max, p.machine().Info().Size.Memory)
		}
		if got := p.record.now().Config.Resources; got.Memory != 256*mib || got.CPUQuota != 200000 {
			t.Errorf("the pod's resources are %+v", got)
		}
		if sizes[0] != sizes[4] || sizes[1] != sizes[5] {
			t.Errorf("its cgroup and its VM grow: %v", sizes)
		}
		if err := p.Update(soon(t), nil, &Resources{Memory: 512 * mib}); err != nil || p.record.now().Config.Resources.Memory != 512*mib {
			t.Errorf("more memory: %+v, %v", p.record.now().Config.Resources, err)
		}
	}
}

// TestNodeOutOfMemory: a VM that the node ended for want of memory, and its containers, say so.
func TestNodeOutOfMemory(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	c := n.running(p, containerConfig("main"))
	n.inCgroup(p, map[string]string{"memory.events": "low 0\noom 3\noom_kill 1\noom_group_kill 0\n"})
	n.driver.VMs()[0].End(errInjected)
	n.until("end", func() bool { return p.Status().State == NotReady && c.Status().State == Exited })
	if s := p.Status(); s.Reason != "OOMKilled" || !strings.Contains(s.Message, "no memory") || !strings.Contains(s.Message, "injected") {
		t.Errorf("the pod: %s, %s", s.Reason, s.Message)
	}
	if s := c.Status(); s.Reason != "OOMKilled" || s.ExitCode != 137 {
		t.Errorf("its container: %s, %d", s.Reason, s.ExitCode)
	}
}
