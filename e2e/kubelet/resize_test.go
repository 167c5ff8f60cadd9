package kubelet

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
)

// grown is a pod whose resources change in place: static pods are updated, and not replaced, where the manifest
// names their UID. The other container's stay.
func grown(cpu string, memory int) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: grown, uid: 5f1c3c1e-0d0e-4c3f-9a51-6a2b7c8d9e0f}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: resized
    image: %[1]s
    command: [sleep, "100000"]
    resources: {requests: {cpu: 50m, memory: 32Mi}, limits: {cpu: %[2]s, memory: %[3]dMi}}
  - name: other
    image: %[1]s
    command: [sleep, "100000"]
    resources: {requests: {cpu: 50m, memory: 32Mi}, limits: {cpu: 250m, memory: 128Mi}}
`, images.Busybox, cpu, memory)
}

// testResize has the kubelet resize a pod in place, up and down: container, VM and the pod's cgroup follow, and
// nothing is started anew.
func (m *machine) testResize(t *testing.T) {
	m.apply(t, "grown", grown("500m", 256))
	p := m.await(t, "a pod to resize is ready", "grown", ready)
	before := p.container("resized").ContainerID
	for _, to := range []struct {
		cpu           string
		quota, memory int
		cpus          string
	}{
		{"1500m", 150000, 512, "2"},
		{"1500m", 150000, 1024, "2"},
		{"250m", 25000, 1024, "2"}, // Cloud Hypervisor takes no CPU away
		{"250m", 25000, 192, "2"},
	} {
		m.apply(t, "grown", grown(to.cpu, to.memory))
		what := fmt.Sprintf("limits of %s and %d MiB", to.cpu, to.memory)
		m.await(t, what, "grown", func(p pod) bool {
			l := p.container("resized").Resources.Limits
			return l["cpu"] == to.cpu && mebibytes(l["memory"]) == to.memory && !p.is("PodResizePending") && !p.is("PodResizeInProgress")
		})
		for file, want := range map[string]string{
			"memory.max": fmt.Sprintln(to.memory << 20), "cpu.max": fmt.Sprintln(to.quota, 100000),
		} {
			if out, err := m.run("grown", "resized", "cat /sys/fs/cgroup/"+file); err != nil || out != want {
				t.Errorf("%s: %s is %q, %v; want %q", what, file, out, err, want)
			}
		}
		if out, err := m.run("grown", "other", "cat /sys/fs/cgroup/memory.max"); err != nil || out != fmt.Sprintln(128<<20) {
			t.Errorf("%s: the other container has %q, %v", what, out, err)
		}
		if out, err := m.run("grown", "other", "nproc"); err != nil || out != to.cpus+"\n" {
			t.Errorf("%s: the VM has %q CPUs, %v", what, out, err)
		}
		eventually(t, what+" for the VM", func() error {
			out, err := m.run("grown", "other", "cat /proc/meminfo")
			if err != nil {
				return err
			}
			if total, want := memTotal(out), to.memory+128; total < want-64 || total > want+192 {
				return fmt.Errorf("it has %d MiB, want %d and a little more", total, want)
			}
			return nil
		})
		eventually(t, what+", with room for the VM, for the pod's cgroup", func() error {
			text, err := os.ReadFile(filepath.Join(cgroup(p), "memory.max"))
			if err != nil {
				return err
			}
			n, err := strconv.Atoi(strings.TrimSpace(string(text)))
			if least := (to.memory + 128) << 20; err != nil || n <= least || n > least+256<<20 {
				return fmt.Errorf("it is %q, %v", text, err)
			}
			return nil
		})
	}
	p = m.await(t, "the pod is ready after all", "grown", ready)
	if c := p.container("resized"); c.ContainerID != before || c.RestartCount+p.container("other").RestartCount != 0 {
		t.Errorf("a container was started anew: %+v", c)
	}
	if lines, err := harness.ReadLog(p.logFile("resized")); err != nil || len(lines) != 0 {
		t.Errorf("its log: %v, %v", lines, err)
	}
	m.remove(t, "grown")
}

// mebibytes reads a quantity that has that unit, or a larger one.
func mebibytes(quantity string) int {
	for unit, factor := range map[string]int{"Mi": 1, "Gi": 1 << 10} {
		if number, ok := strings.CutSuffix(quantity, unit); ok {
			n, _ := strconv.Atoi(number)
			return n * factor
		}
	}
	return 0
}
