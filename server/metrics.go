package server

import (
	"context"
	"path"
	"time"

	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/podvm"
)

// The metrics that the kubelet serves on /metrics/cadvisor when it takes pods' stats from the CRI.
// Names and labels are cAdvisor's, so that dashboards and alerts go on working. What a guest does
// not tell (packets, throttled periods, ...) is left out rather than made up.

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
		name: "container_memory_swap", help: "Container swap usage in bytes.", gauge: true,
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.SwapUsage }),
	},
	{
		name: "container_memory_failures_total", help: "Cumulative count of memory allocation failures.",
		labels: []string{"failure_type", "scope"}, rows: [][]string{{"pgfault", "hierarchy"}, {"pgmajfault", "hierarchy"}},
		value: func(g podvm.Cgroup) []uint64 { return []uint64{g.PageFaults, g.MajorPageFaults} },
	},
	{
		name: "container_processes", help: "Number of processes running inside the container.", gauge: true,
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.PIDs }),
	},
	{
		name: "container_spec_memory_limit_bytes", help: "Memory limit for the container.", gauge: true,
		rows: oneRow, value: single(func(g podvm.Cgroup) uint64 { return g.MemoryLimit }),
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

// networkMetrics are those of a pod's interfaces.
var networkMetrics = []struct {
	name, help string
	value      func(n podvm.NetStats) uint64
}{
	{"container_network_receive_bytes_total", "Cumulative count of bytes received.", func(n podvm.NetStats) uint64 { return n.RxBytes }},
	{"container_network_receive_errors_total", "Cumulative count of errors encountered while receiving.", func(n podvm.NetStats) uint64 { return n.RxErrors }},
	{"container_network_transmit_bytes_total", "Cumulative count of bytes transmitted.", func(n podvm.NetStats) uint64 { return n.TxBytes }},
	{"container_network_transmit_errors_total", "Cumulative count of errors encountered while transmitting.", func(n podvm.NetStats) uint64 { return n.TxErrors }},
}

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
	for _, m := range cgroupMetrics {
		all = append(all, describe(m.name, m.help, m.labels...))
	}
	for _, m := range networkMetrics {
		all = append(all, describe(m.name, m.help, "interface"))
	}
	all = append(all,
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
		m := &cri.PodSandboxMetrics{PodSandboxId: one.status.ID, Metrics: ofCgroup(one.stats.Pod, base)}
		for _, n := range one.stats.Network {
			for _, nm := range networkMetrics {
				m.Metrics = append(m.Metrics, row(nm.name, cri.MetricType_COUNTER, nm.value(n), base, n.Name))
			}
		}
		for _, cs := range one.stats.Containers {
			if status, known := one.containers[cs.ID]; known {
				base := []string{status.Config.Name, path.Join(group, cs.ID), status.Config.ImageName, cs.ID, c.Namespace, c.Name}
				m.ContainerMetrics = append(m.ContainerMetrics, containerMetrics(status, cs, base))
			}
		}
		all = append(all, m)
	}
	return all
}

func containerMetrics(status podvm.ContainerStatus, cs podvm.ContainerStats, base []string) *cri.ContainerMetrics {
	m := &cri.ContainerMetrics{ContainerId: cs.ID, Metrics: ofCgroup(cs.Cgroup, base)}
	if !status.Started.IsZero() {
		m.Metrics = append(m.Metrics, row(startTime, cri.MetricType_GAUGE, uint64(status.Started.Unix()), base))
	}
	m.Metrics = append(m.Metrics, row(fsUsage, cri.MetricType_GAUGE, cs.LayerBytes, base, "scratch"))
	return m
}

func ofCgroup(g podvm.Cgroup, base []string) []*cri.Metric {
	var all []*cri.Metric
	for _, m := range cgroupMetrics {
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
