package server

import (
	"context"
	"path"
	"slices"
	"time"

	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/podvm"
)

// The metrics that the kubelet serves on /metrics/cadvisor when it takes pods' stats from the CRI
// (feature gate PodAndContainerStatsFromCRI). Names and labels are cAdvisor's, so that dashboards and
// alerts go on working. What a guest does not tell (the time that I/O took, ...) is left out rather than
// made up, and a container that has exited has no figures but the size of its writable layer.

// baseLabels come first in every metric. Those of a pod as a whole have no container and no image.
var baseLabels = []string{"container", "id", "image", "name", "namespace", "pod"}

// metric is one that is read off a cgroup.
type metric struct {
	name, help string
	gauge      bool
	// labels beyond the base, with the values they have for each number that value returns.
	labels []string
	rows   [][]string
	value  func(g podvm.Cgroup) []uint64
}

var oneRow = [][]string{nil}

func single(f func(podvm.Cgroup) uint64) func(podvm.Cgroup) []uint64 {
	return func(g podvm.Cgroup) []uint64 { return []uint64{f(g)} }
}

func seconds(d time.Duration) uint64 { return uint64(max(d, 0) / time.Second) }

// pressure reads one PSI counter; a guest without PSI has none.
func pressure(of func(podvm.Cgroup) *podvm.PSI, full bool) func(podvm.Cgroup) []uint64 {
	return func(g podvm.Cgroup) []uint64 {
		p := of(g)
		switch {
		case p == nil:
			return nil
		case full:
			return []uint64{seconds(p.Full.Total)}
		}
		return []uint64{seconds(p.Some.Total)}
	}
}

func cpuPSI(g podvm.Cgroup) *podvm.PSI    { return g.CPUPSI }
func memoryPSI(g podvm.Cgroup) *podvm.PSI { return g.MemoryPSI }
func ioPSI(g podvm.Cgroup) *podvm.PSI     { return g.IOPSI }

var cgroupMetrics = []metric{
	{
		name: "container_cpu_usage_seconds_total", help: "Cumulative cpu time consumed in seconds.",
		labels: []string{"cpu"}, rows: [][]string{{"total"}},
		value: single(func(g podvm.Cgroup) uint64 { return seconds(g.CPUUsage) }),
	},
	{
		name: "container_cpu_user_seconds_total", help: "Cumulative user cpu time consumed in seconds.",
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return seconds(g.CPUUser) }),
	},
	{
		name: "container_cpu_system_seconds_total", help: "Cumulative system cpu time consumed in seconds.",
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return seconds(g.CPUSystem) }),
	},
	{
		name: "container_memory_usage_bytes", help: "Current memory usage in bytes, including all memory regardless of when it was accessed.", gauge: true,
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.MemoryUsage }),
	},
	{
		name: "container_memory_working_set_bytes", help: "Current working set in bytes.", gauge: true,
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.MemoryWorkingSet }),
	},
	{
		name: "container_memory_rss", help: "Size of RSS in bytes.", gauge: true,
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.MemoryRSS }),
	},
	{
		name: "container_memory_cache", help: "Number of bytes of page cache memory.", gauge: true,
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.MemoryCache }),
	},
	{
		name: "container_memory_mapped_file", help: "Size of memory mapped files in bytes.", gauge: true,
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.MemoryMappedFile }),
	},
	{
		name: "container_memory_total_active_file_bytes", help: "Current total active file in bytes.", gauge: true,
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.MemoryActiveFile }),
	},
	{
		name: "container_memory_total_inactive_file_bytes", help: "Current total inactive file in bytes.", gauge: true,
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.MemoryInactiveFile }),
	},
	{
		name: "container_memory_kernel_usage", help: "Size of kernel memory allocated in bytes.", gauge: true,
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.MemoryKernel }),
	},
	{
		name: "container_memory_swap", help: "Container swap usage in bytes.", gauge: true,
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.SwapUsage }),
	},
	{
		name: "container_memory_failures_total", help: "Cumulative count of memory allocation failures.",
		labels: []string{"failure_type", "scope"},
		// The kernel (cgroup v2) counts hierarchies only; cAdvisor has them as the container's own, too.
		rows: [][]string{{"pgfault", "container"}, {"pgfault", "hierarchy"}, {"pgmajfault", "container"}, {"pgmajfault", "hierarchy"}},
		value: func(g podvm.Cgroup) []uint64 {
			return []uint64{g.PageFaults, g.PageFaults, g.MajorPageFaults, g.MajorPageFaults}
		},
	},
	{
		name: "container_memory_failcnt", help: "Number of memory usage hits limits.",
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.MemoryLimitHits }),
	},
	{
		name: "container_oom_events_total", help: "Count of out of memory events observed for the container.",
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.OOMKills }),
	},
	{
		// With their threads, as containerd and CRI-O have it: that is what the kernel counts.
		name: "container_processes", help: "Number of processes running inside the container.", gauge: true,
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.PIDs }),
	},
	{
		name: "container_threads", help: "Number of threads running inside the container.", gauge: true,
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.PIDs }),
	},
	{
		name: "container_pressure_cpu_waiting_seconds_total", help: "Total time duration tasks in the container have waited due to CPU congestion.",
		rows: oneRow, value: pressure(cpuPSI, false),
	},
	{
		name: "container_pressure_cpu_stalled_seconds_total", help: "Total time duration no tasks in the container could make progress due to CPU congestion.",
		rows: oneRow, value: pressure(cpuPSI, true),
	},
	{
		name: "container_pressure_memory_waiting_seconds_total", help: "Total time duration tasks in the container have waited due to memory congestion.",
		rows: oneRow, value: pressure(memoryPSI, false),
	},
	{
		name: "container_pressure_memory_stalled_seconds_total", help: "Total time duration no tasks in the container could make progress due to memory congestion.",
		rows: oneRow, value: pressure(memoryPSI, true),
	},
	{
		name: "container_pressure_io_waiting_seconds_total", help: "Total time duration tasks in the container have waited due to IO resource congestion.",
		rows: oneRow, value: pressure(ioPSI, false),
	},
	{
		name: "container_pressure_io_stalled_seconds_total", help: "Total time duration no tasks in the container could make progress due to IO resource congestion.",
		rows: oneRow, value: pressure(ioPSI, true),
	},
}

// throttled reads what a limit of CPU time did; a guest without such limits has nothing of it.
func throttled(of func(podvm.Throttling) uint64) func(podvm.Cgroup) []uint64 {
	return func(g podvm.Cgroup) []uint64 {
		if g.Throttling == nil {
			return nil
		}
		return []uint64{of(*g.Throttling)}
	}
}

// throttlingMetrics are those of containers with a quota. A pod as a whole has none in its guest: what
// it may use is the number of its vCPUs.
var throttlingMetrics = []metric{
	{
		name: "container_cpu_cfs_periods_total", help: "Number of elapsed enforcement period intervals.",
		rows: oneRow, value: throttled(func(t podvm.Throttling) uint64 { return t.Periods }),
	},
	{
		name: "container_cpu_cfs_throttled_periods_total", help: "Number of throttled period intervals.",
		rows: oneRow, value: throttled(func(t podvm.Throttling) uint64 { return t.ThrottledPeriods }),
	},
	{
		name: "container_cpu_cfs_throttled_seconds_total", help: "Total time duration the container has been throttled.",
		rows: oneRow, value: throttled(func(t podvm.Throttling) uint64 { return seconds(t.Throttled) }),
	},
}

// diskMetrics are those of the guest's disks that a cgroup has read or written.
var diskMetrics = []struct {
	name, help string
	value      func(d podvm.DiskIO) uint64
}{
	{"container_fs_reads_total", "Cumulative count of reads completed.", func(d podvm.DiskIO) uint64 { return d.Reads }},
	{"container_fs_reads_bytes_total", "Cumulative count of bytes read.", func(d podvm.DiskIO) uint64 { return d.ReadBytes }},
	{"container_fs_writes_total", "Cumulative count of writes completed.", func(d podvm.DiskIO) uint64 { return d.Writes }},
	{"container_fs_writes_bytes_total", "Cumulative count of bytes written.", func(d podvm.DiskIO) uint64 { return d.WriteBytes }},
}

// networkMetrics are those of a pod's interfaces.
var networkMetrics = []struct {
	name, help string
	value      func(n podvm.NetStats) uint64
}{
	{"container_network_receive_bytes_total", "Cumulative count of bytes received.", func(n podvm.NetStats) uint64 { return n.RxBytes }},
	{"container_network_receive_packets_total", "Cumulative count of packets received.", func(n podvm.NetStats) uint64 { return n.RxPackets }},
	{"container_network_receive_packets_dropped_total", "Cumulative count of packets dropped while receiving.", func(n podvm.NetStats) uint64 { return n.RxDropped }},
	{"container_network_receive_errors_total", "Cumulative count of errors encountered while receiving.", func(n podvm.NetStats) uint64 { return n.RxErrors }},
	{"container_network_transmit_bytes_total", "Cumulative count of bytes transmitted.", func(n podvm.NetStats) uint64 { return n.TxBytes }},
	{"container_network_transmit_packets_total", "Cumulative count of packets transmitted.", func(n podvm.NetStats) uint64 { return n.TxPackets }},
	{"container_network_transmit_packets_dropped_total", "Cumulative count of packets dropped while transmitting.", func(n podvm.NetStats) uint64 { return n.TxDropped }},
	{"container_network_transmit_errors_total", "Cumulative count of errors encountered while transmitting.", func(n podvm.NetStats) uint64 { return n.TxErrors }},
}

// specMetrics are limits as the kubelet set them. Those of CPU are left out where there are none; no
// limit of memory is 0, as in cAdvisor.
var specMetrics = []struct {
	name, help string
	value      func(r podvm.Resources) int64
}{
	{"container_spec_cpu_period", "CPU period of the container.", func(r podvm.Resources) int64 { return r.CPUPeriod }},
	{"container_spec_cpu_quota", "CPU quota of the container.", func(r podvm.Resources) int64 { return r.CPUQuota }},
	{"container_spec_cpu_shares", "CPU share of the container.", func(r podvm.Resources) int64 { return r.CPUShares }},
	{specMemory, "Memory limit for the container.", func(r podvm.Resources) int64 { return r.Memory }},
}

const (
	specMemory = "container_spec_memory_limit_bytes"
	lastSeen   = "container_last_seen"
)

// The metrics that only containers have.
const (
	startTime = "container_start_time_seconds"
	fsUsage   = "container_fs_usage_bytes"
)

// ListMetricDescriptors describes the metrics that ListPodSandboxMetrics returns.
func (s *runtimeService) ListMetricDescriptors(context.Context, *cri.ListMetricDescriptorsRequest) (*cri.ListMetricDescriptorsResponse, error) {
	describe := func(name, help string, labels ...string) *cri.MetricDescriptor {
		return &cri.MetricDescriptor{Name: name, Help: help, LabelKeys: append(baseLabels[:len(baseLabels):len(baseLabels)], labels...)}
	}
	var all []*cri.MetricDescriptor
	for _, m := range slices.Concat(cgroupMetrics, throttlingMetrics) {
		all = append(all, describe(m.name, m.help, m.labels...))
	}
	for _, m := range diskMetrics {
		all = append(all, describe(m.name, m.help, "device"))
	}
	for _, m := range networkMetrics {
		all = append(all, describe(m.name, m.help, "interface"))
	}
	for _, m := range specMetrics {
		all = append(all, describe(m.name, m.help))
	}
	all = append(all,
		describe(lastSeen, "Last time a container was seen by the exporter."),
		describe(startTime, "Start time of the container since unix epoch in seconds."),
		describe(fsUsage, "Number of bytes that are consumed by the container on this filesystem.", "device"))
	return &cri.ListMetricDescriptorsResponse{Descriptors: all}, nil
}

// ListPodSandboxMetrics returns the metrics of all running pods.
func (s *runtimeService) ListPodSandboxMetrics(ctx context.Context, _ *cri.ListPodSandboxMetricsRequest) (*cri.ListPodSandboxMetricsResponse, error) {
	return &cri.ListPodSandboxMetricsResponse{PodMetrics: s.podMetrics(ctx)}, nil
}

// StreamPodSandboxMetrics is ListPodSandboxMetrics in pieces.
func (s *runtimeService) StreamPodSandboxMetrics(_ *cri.StreamPodSandboxMetricsRequest, out grpc.ServerStreamingServer[cri.StreamPodSandboxMetricsResponse]) error {
	return inPieces(s.podMetrics(out.Context()), func(piece []*cri.PodSandboxMetrics) error {
		return out.Send(&cri.StreamPodSandboxMetricsResponse{PodSandboxMetrics: piece})
	})
}

func (s *runtimeService) podMetrics(ctx context.Context) []*cri.PodSandboxMetrics {
	var all []*cri.PodSandboxMetrics
	for _, one := range s.askAll(ctx, s.o.Pods.Pods()) {
		c := &one.status.Config
		group := path.Join("/", one.status.Cgroup, one.status.ID)
		base := []string{"", group, "", "", c.Namespace, c.Name}
		m := &cri.PodSandboxMetrics{PodSandboxId: one.status.ID, Metrics: ofCgroup(one.stats.Pod, one.at, base)}
		if c.Resources != nil {
			m.Metrics = append(m.Metrics, ofSpec(*c.Resources, base)...)
		}
		for _, n := range one.stats.Network {
			for _, nm := range networkMetrics {
				m.Metrics = append(m.Metrics, row(nm.name, cri.MetricType_COUNTER, nm.value(n), base, n.Name))
			}
		}
		for _, cs := range one.stats.Containers {
			if status, known := one.containers[cs.ID]; known {
				base := []string{status.Config.Name, path.Join(group, cs.ID), status.Config.ImageName, cs.ID, c.Namespace, c.Name}
				m.ContainerMetrics = append(m.ContainerMetrics, containerMetrics(status, cs, one.at, base))
			}
		}
		all = append(all, m)
	}
	return all
}

// containerMetrics are a container's. Of its exit either the node or its guest may know first; counters
// that drop to 0 would look like a new beginning.
func containerMetrics(status podvm.ContainerStatus, cs podvm.ContainerStats, at time.Time, base []string) *cri.ContainerMetrics {
	m := &cri.ContainerMetrics{ContainerId: cs.ID}
	if cs.Cgroup.Known && status.State != podvm.Exited {
		m.Metrics = ofLiving(status, cs.Cgroup, at, base)
	}
	m.Metrics = append(m.Metrics, row(fsUsage, cri.MetricType_GAUGE, cs.LayerBytes, base, "scratch"))
	return m
}

func ofLiving(status podvm.ContainerStatus, g podvm.Cgroup, at time.Time, base []string) []*cri.Metric {
	limits := status.Config.Resources
	all := append(ofCgroup(g, at, base), ofSpec(limits, base)...)
	if limits.CPUQuota > 0 {
		all = append(all, rows(throttlingMetrics, g, base)...)
	}
	if !status.Started.IsZero() {
		all = append(all, row(startTime, cri.MetricType_GAUGE, uint64(status.Started.Unix()), base))
	}
	return all
}

// ofCgroup are the metrics that pods and containers have; of a cgroup that is not known, none.
func ofCgroup(g podvm.Cgroup, at time.Time, base []string) []*cri.Metric {
	if !g.Known {
		return nil
	}
	all := append(rows(cgroupMetrics, g, base), row(lastSeen, cri.MetricType_GAUGE, uint64(at.Unix()), base))
	for _, d := range g.Disks {
		for _, m := range diskMetrics {
			all = append(all, row(m.name, cri.MetricType_COUNTER, m.value(d), base, "/dev/"+d.Device))
		}
	}
	return all
}

func ofSpec(r podvm.Resources, base []string) []*cri.Metric {
	var all []*cri.Metric
	for _, m := range specMetrics {
		if v := m.value(r); v > 0 || m.name == specMemory {
			all = append(all, row(m.name, cri.MetricType_GAUGE, uint64(max(v, 0)), base))
		}
	}
	return all
}

func rows(list []metric, g podvm.Cgroup, base []string) []*cri.Metric {
	var all []*cri.Metric
	for _, m := range list {
		kind := cri.MetricType_COUNTER
		if m.gauge {
			kind = cri.MetricType_GAUGE
		}
		for i, v := range m.value(g) {
			all = append(all, row(m.name, kind, v, base, m.rows[i]...))
		}
	}
	return all
}

func row(name string, kind cri.MetricType, value uint64, base []string, more ...string) *cri.Metric {
	return &cri.Metric{
		Name: name, MetricType: kind, Value: number(value),
		LabelValues: append(base[:len(base):len(base)], more...),
	}
}
