package kubelet

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
)

// summary is the kubelet's, as far as the test looks.
type summary struct {
	Pods []struct {
		PodRef     struct{ Name string }
		CPU        cpuStats
		Memory     memoryStats
		Network    struct{ RxBytes, TxBytes uint64 }
		Containers []containerStats
	}
}

type containerStats struct {
	Name   string
	CPU    cpuStats
	Memory memoryStats
	Rootfs struct{ UsedBytes uint64 }
}

type cpuStats struct{ UsageCoreNanoSeconds, UsageNanoCores uint64 }
type memoryStats struct{ UsageBytes, WorkingSetBytes, RSSBytes uint64 }

// testStats has a container burn CPU, take memory and write files, and compares what the kubelet
// says of it with what the guest's own kernel says.
func (m *machine) testStats(t *testing.T) {
	p := m.await(t, "the pod is ready", "pair", ready)
	id := p.container("worker").id()
	const mib = 1 << 20
	for _, script := range []string{
		"i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done",
		"dd if=/dev/zero of=/dev/shm/held bs=1M count=40",
		"dd if=/dev/zero of=/tmp/written bs=1M count=20",
	} {
		crictl(t, "exec", id, "sh", "-c", script)
	}

	before := guestCPU(t, id)
	var s summary
	if err := read("/stats/summary", &s); err != nil {
		t.Fatal(err)
	}
	metrics, err := call("GET", "/metrics/cadvisor")
	if err != nil {
		t.Fatal(err)
	}
	after := guestCPU(t, id)

	worker, found := workerOf(s, p.Metadata.Name)
	if !found {
		t.Fatalf("no worker in the summary: %+v", s)
	}
	if cpu := worker.CPU.UsageCoreNanoSeconds; cpu < before || cpu > after || cpu < 1e9 {
		t.Errorf("CPU by the summary: %d ns; the guest said %d before, %d after", cpu, before, after)
	}
	if used := worker.Memory.WorkingSetBytes; used < 40*mib || used > 100*mib {
		t.Errorf("working set: %d MiB, with 40 in /dev/shm", used/mib)
	}
	if used := worker.Rootfs.UsedBytes; used < 20*mib || used > 40*mib {
		t.Errorf("root file system: %d MiB, with 20 written", used/mib)
	}
	m.compareMetrics(t, string(metrics), float64(before)/1e9, float64(after)/1e9)
}

// compareMetrics looks at what Prometheus would get.
func (m *machine) compareMetrics(t *testing.T, text string, least, most float64) {
	t.Helper()
	cpu, err := metric(text, "container_cpu_usage_seconds_total", `container="worker"`, `namespace="default"`, `pod="pair-`+m.name+`"`)
	if err != nil || cpu < least-1 || cpu > most { // whole seconds
		t.Errorf("CPU by the metrics: %.1f s, %v; the guest said %.1f before, %.1f after", cpu, err, least, most)
	}
	memory, err := metric(text, "container_memory_working_set_bytes", `container="worker"`, `pod="pair-`+m.name+`"`)
	if err != nil || memory < 40<<20 || memory > 100<<20 {
		t.Errorf("working set by the metrics: %.0f, %v", memory, err)
	}
	if received, err := metric(text, "container_network_receive_bytes_total", `interface="eth0"`, `pod="pair-`+m.name+`"`); err != nil || received == 0 {
		t.Errorf("received bytes by the metrics: %.0f, %v", received, err)
	}
	if received, err := metric(text, "container_network_receive_packets_total", `interface="eth0"`, `pod="pair-`+m.name+`"`); err != nil || received == 0 {
		t.Errorf("received packets by the metrics: %.0f, %v", received, err)
	}
	if cache, err := metric(text, "container_memory_cache", `container="worker"`, `pod="pair-`+m.name+`"`); err != nil || cache < 40<<20 {
		t.Errorf("files in memory by the metrics: %.0f, %v, with 40 MiB in /dev/shm", cache, err)
	}
}

func workerOf(s summary, name string) (containerStats, bool) {
	for _, p := range s.Pods {
		if p.PodRef.Name != name {
			continue
		}
		for _, c := range p.Containers {
			if c.Name == "worker" {
				return c, p.CPU.UsageCoreNanoSeconds >= c.CPU.UsageCoreNanoSeconds && p.Network.RxBytes > 0
			}
		}
	}
	return containerStats{}, false
}

// metric is the value of the one series that has all the labels.
func metric(text, name string, labels ...string) (float64, error) {
	for line := range strings.Lines(text) {
		series, value, ok := strings.Cut(strings.TrimSpace(line), "} ")
		if !ok || !strings.HasPrefix(series, name+"{") {
			continue
		}
		all := true
		for _, label := range labels {
			all = all && strings.Contains(series, label)
		}
		if all {
			return strconv.ParseFloat(strings.Fields(value)[0], 64)
		}
	}
	return 0, fmt.Errorf("no series %s with %v", name, labels)
}

// guestCPU is the CPU time of a container, in ns, by the cgroup as it sees it itself.
func guestCPU(t *testing.T, id string) uint64 {
	t.Helper()
	out := crictl(t, "exec", id, "cat", "/sys/fs/cgroup/cpu.stat")
	var us uint64
	if _, err := fmt.Sscanf(out, "usage_usec %d", &us); err != nil {
		t.Fatalf("cpu.stat in the container: %q: %v", out, err)
	}
	return us * 1000
}
