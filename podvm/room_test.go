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

// TestMakeRoom: the kubelet's limit becomes what the VM needs at most; other limits stay.
func TestMakeRoom(t *testing.T) {
	const mib = 1 << 20
	n := newNode(t)
	p := n.pod(podConfig("web"))
	for name, c := range map[string]struct {
		limit, overhead int64
		now, want       string
	}{
		"the kubelet's":                       {256 * mib, 0, fmt.Sprintln(256 * mib), fmt.Sprint(256*mib + 64*mib + 32*mib + 320*mib/128)},
		"with the overhead of a RuntimeClass": {256 * mib, 128 * mib, fmt.Sprintln(384 * mib), fmt.Sprint(256*mib + 128*mib + 32*mib + 384*mib/128)},
		"no whole pages":                      {256*mib + 1, 0, fmt.Sprintln(256 * mib), fmt.Sprint(256*mib + 1 + 64*mib + 32*mib + (320*mib+1)/128)},
		"somebody's, who wants less":          {256 * mib, 0, fmt.Sprintln(200 * mib), fmt.Sprintln(200 * mib)},
		"somebody's, who allows more":         {256 * mib, 0, fmt.Sprintln(2048 * mib), fmt.Sprintln(2048 * mib)},
		"none":                                {256 * mib, 0, "max\n", "max\n"},
		"the pod has none":                    {0, 0, fmt.Sprintln(256 * mib), fmt.Sprintln(256 * mib)},
	} {
		dir := n.inCgroup(p, map[string]string{"memory.max": c.now})
		config := podConfig("web")
		config.Resources, config.Overhead = &Resources{Memory: c.limit}, &Resources{Memory: c.overhead}
		p.makeRoom(config)
		if got, err := os.ReadFile(filepath.Join(dir, "memory.max")); err != nil || string(got) != c.want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, c.want)
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
