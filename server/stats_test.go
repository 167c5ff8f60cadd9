package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/podvm"
)

func psi(d time.Duration) *podvm.PSI {
	return &podvm.PSI{Full: podvm.PSIData{Total: d, Avg10: 1.5}, Some: podvm.PSIData{Total: 2 * d}}
}

// sampleStats is the answer of a guest with one container of ours and one it made up.
func sampleStats(container string) func(context.Context) (podvm.PodStats, error) {
	group := podvm.Cgroup{
		Known: true, CPUUsage: 90 * time.Second, CPUUser: 60 * time.Second, CPUSystem: 30 * time.Second,
		Throttling:  &podvm.Throttling{Periods: 50, ThrottledPeriods: 20, Throttled: 8 * time.Second},
		MemoryUsage: 300, MemoryWorkingSet: 200, MemoryRSS: 100, MemoryCache: 180, MemoryMappedFile: 40,
		MemoryActiveFile: 70, MemoryInactiveFile: 110, MemoryKernel: 15, MemoryLimitHits: 6, OOMKills: 2,
		PageFaults: 7, MajorPageFaults: 1, PIDs: 4,
		Disks:  []podvm.DiskIO{{Device: "vda", Reads: 11, ReadBytes: 12, Writes: 13, WriteBytes: 14}, {Device: "vdb", Reads: 1}},
		CPUPSI: psi(3 * time.Second), IOPSI: psi(5 * time.Second),
	}
	limited := group
	limited.MemoryLimit = 150
	return func(context.Context) (podvm.PodStats, error) {
		return podvm.PodStats{
			Pod: group, MemoryTotal: 1000,
			Containers: []podvm.ContainerStats{{ID: container, Cgroup: limited, LayerBytes: 8192, LayerInodes: 3}, {ID: "made-up"}},
			Network: []podvm.NetStats{{Name: "lo", RxBytes: 99}, {Name: "net1", RxBytes: 1}, {
				Name: "eth0", RxBytes: 10, RxPackets: 3, RxDropped: 4, TxBytes: 20, TxPackets: 5, TxErrors: 2, TxDropped: 6,
			}},
		}, nil
	}
}

func TestStats(t *testing.T) {
	d := start(t)
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)
	pod, container := d.running(t)
	d.pods.pods[0].stats = sampleStats(container)

	p := must(c.PodSandboxStats(ctx, &cri.PodSandboxStatsRequest{PodSandboxId: pod[:9]}))(t).GetStats()
	l := p.GetLinux()
	if l.GetCpu().GetUsageCoreNanoSeconds().GetValue() != 90e9 || l.GetCpu().GetUsageNanoCores().GetValue() == 0 || l.GetCpu().GetTimestamp() == 0 ||
		l.GetCpu().GetPsi().GetFull().GetTotal() != 3e9 || l.GetMemory().GetAvailableBytes().GetValue() != 800 ||
		l.GetProcess().GetProcessCount().GetValue() != 4 || l.GetIo().GetPsi().GetSome().GetTotal() != 10e9 || l.GetMemory().GetPsi() != nil {
		t.Errorf("pod: %v", l)
	}
	if n := l.GetNetwork(); n.GetDefaultInterface().GetName() != "eth0" || n.GetDefaultInterface().GetTxErrors().GetValue() != 2 ||
		len(n.GetInterfaces()) != 1 || n.GetInterfaces()[0].GetName() != "net1" {
		t.Errorf("network: %v", n)
	}
	if len(l.GetContainers()) != 1 || p.GetAttributes().GetMetadata().GetName() != "web-0" {
		t.Errorf("containers: %v of %v", l.GetContainers(), p.GetAttributes())
	}
	s := must(c.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: container}))(t).GetStats()
	if s.GetMemory().GetAvailableBytes().GetValue() != 0 || s.GetMemory().GetAvailableBytes() == nil || s.GetWritableLayer().GetUsedBytes().GetValue() != 8192 ||
		s.GetWritableLayer().GetFsId().GetMountpoint() == "" || s.GetAttributes().GetMetadata().GetName() != "nginx" {
		t.Errorf("container: %v", s)
	}
	for name, tc := range map[string]struct {
		filter *cri.ContainerStatsFilter
		n      int
	}{
		"all":       {nil, 1},
		"id":        {&cri.ContainerStatsFilter{Id: container[:7]}, 1},
		"unknown":   {&cri.ContainerStatsFilter{Id: "feed"}, 0},
		"pod":       {&cri.ContainerStatsFilter{PodSandboxId: pod[:7]}, 1},
		"other pod": {&cri.ContainerStatsFilter{Id: container, PodSandboxId: "feed"}, 0},
		"label":     {&cri.ContainerStatsFilter{LabelSelector: map[string]string{"l": "no"}}, 0},
	} {
		if got := must(c.ListContainerStats(ctx, &cri.ListContainerStatsRequest{Filter: tc.filter}))(t).GetStats(); len(got) != tc.n {
			t.Errorf("%s: %d; want %d", name, len(got), tc.n)
		}
	}
	must(c.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod}))(t)
	_, err := c.PodSandboxStats(ctx, &cri.PodSandboxStatsRequest{PodSandboxId: pod})
	wantCode(t, err, codes.FailedPrecondition)
}

// TestSilentGuest: one guest that does not answer hides no other, and a list waits for it only
// so long.
func TestSilentGuest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pods := &fakePods{}
		for i := range 3 {
			c, err := podConfig(fullPod(), "")
			if err != nil {
				t.Fatal(err)
			}
			c.UID = fmt.Sprint(i)
			if _, err := pods.Run(t.Context(), c); err != nil {
				t.Fatal(err)
			}
		}
		pods.pods[0].stats = func(ctx context.Context) (podvm.PodStats, error) { <-ctx.Done(); return podvm.PodStats{}, ctx.Err() }
		pods.pods[1].stats = func(context.Context) (podvm.PodStats, error) { return podvm.PodStats{}, errors.New("no agent") }
		var log logs
		s := &runtimeService{o: Options{Pods: pods, Log: textLog(&log)}, rates: newRates()}
		began := time.Now()
		r, err := s.ListPodSandboxStats(t.Context(), &cri.ListPodSandboxStatsRequest{})
		if err != nil || len(r.GetStats()) != 1 || r.GetStats()[0].GetAttributes().GetMetadata().GetUid() != "2" {
			t.Errorf("%v, %v", r, err)
		}
		if took := time.Since(began); took != statsLimit {
			t.Errorf("took %s; want %s", took, statsLimit)
		}
		if strings.Count(log.String(), "no stats") != 2 {
			t.Errorf("log:\n%s", log.String())
		}
	})
}

func TestRates(t *testing.T) {
	r, started := newRates(), time.Unix(1000, 0)
	for i, step := range []struct {
		after time.Duration // since the start
		usage uint64        // ms
		want  uint64        // thousandths of a core
	}{
		{10 * time.Second, 5000, 500},       // since the start
		{20 * time.Second, 15000, 1000},     // since the last
		{20*time.Second + 100, 15001, 1000}, // too soon to say anything new
		{22 * time.Second, 15000, 0},        // idle
		{40 * time.Second, 4000, 100},       // ran backwards: counted from the start
		{50 * time.Second, 1 << 43, 0},      // nonsense does no harm
		{49 * time.Second, 6000, 122},       // nor does a clock that jumps
	} {
		got := r.nanoCores("a", step.usage*1e6, started.Add(step.after), started) / 1e6
		if got != step.want && step.usage < 1e9 {
			t.Errorf("step %d: %d; want %d", i, got, step.want)
		}
	}
	if got := r.nanoCores("b", 5, started, time.Time{}); got != 0 {
		t.Errorf("never started: %d", got)
	}
	r.prune(started.Add(49*time.Second + rateKeep + 1))
	if len(r.last) != 0 {
		t.Errorf("kept %v", r.last)
	}
}

// series are metrics by name and labels, but for the id and those that are empty. The kubelet can
// translate them, or it drops them; and with one that is there twice a scrape fails.
func series(t *testing.T, keys map[string][]string, all ...*cri.Metric) map[string]uint64 {
	t.Helper()
	seen := map[string]uint64{}
	for _, m := range all {
		labels := keys[m.GetName()]
		if len(labels) == 0 || len(labels) != len(m.GetLabelValues()) {
			t.Fatalf("%s has values %q for labels %q", m.GetName(), m.GetLabelValues(), labels)
		}
		row := m.GetName()
		for i, v := range m.GetLabelValues() {
			if labels[i] != "id" && v != "" {
				row += " " + labels[i] + "=" + v
			}
		}
		if _, twice := seen[row]; twice {
			t.Errorf("%s is there twice", row)
		}
		seen[row] = m.GetValue().GetValue()
	}
	return seen
}

// descriptors are the labels of each metric.
func (d *daemon) descriptors(t *testing.T) map[string][]string {
	t.Helper()
	keys := map[string][]string{}
	for _, m := range must(cri.NewRuntimeServiceClient(d.conn).ListMetricDescriptors(t.Context(), &cri.ListMetricDescriptorsRequest{}))(t).GetDescriptors() {
		if keys[m.GetName()] != nil || m.GetHelp() == "" {
			t.Errorf("descriptor %v: twice, or without help", m)
		}
		keys[m.GetName()] = m.GetLabelKeys()
	}
	return keys
}

// metrics are those of the one pod, and of its one container.
func (d *daemon) metrics(t *testing.T, pod string) (ofPod, ofContainer []*cri.Metric) {
	t.Helper()
	all := must(cri.NewRuntimeServiceClient(d.conn).ListPodSandboxMetrics(t.Context(), &cri.ListPodSandboxMetricsRequest{}))(t).GetPodMetrics()
	if len(all) != 1 || all[0].GetPodSandboxId() != pod || len(all[0].GetContainerMetrics()) != 1 {
		t.Fatalf("metrics: %v", all)
	}
	return all[0].GetMetrics(), all[0].GetContainerMetrics()[0].GetMetrics()
}

// TestMetrics: what the guest and the records say is there, with labels as described.
func TestMetrics(t *testing.T) {
	d, began := start(t), time.Now().Unix()
	pod, container := d.running(t)
	d.pods.pods[0].stats = sampleStats(container)
	d.pods.containers[0].status.Config.Resources = podvm.Resources{CPUPeriod: 50_000, CPUQuota: 25_000, CPUShares: 512, Memory: 1 << 26}
	keys := d.descriptors(t)
	ofPod, ofContainer := d.metrics(t, pod)
	seen := series(t, keys, append(ofPod, ofContainer...)...)
	who := " namespace=shop pod=web-0"
	of := " container=nginx image=busybox:1 name=" + container + who
	for row, want := range map[string]uint64{
		"container_cpu_usage_seconds_total" + who + " cpu=total":                            90,
		"container_cpu_usage_seconds_total" + of + " cpu=total":                             90,
		"container_cpu_user_seconds_total" + of:                                             60,
		"container_cpu_system_seconds_total" + who:                                          30,
		"container_cpu_cfs_periods_total" + of:                                              50,
		"container_cpu_cfs_throttled_periods_total" + of:                                    20,
		"container_cpu_cfs_throttled_seconds_total" + of:                                    8,
		"container_memory_working_set_bytes" + of:                                           200,
		"container_memory_cache" + of:                                                       180,
		"container_memory_mapped_file" + of:                                                 40,
		"container_memory_total_active_file_bytes" + of:                                     70,
		"container_memory_total_inactive_file_bytes" + of:                                   110,
		"container_memory_kernel_usage" + of:                                                15,
		"container_memory_failcnt" + of:                                                     6,
		"container_memory_failures_total" + of + " failure_type=pgmajfault scope=hierarchy": 1,
		"container_memory_failures_total" + of + " failure_type=pgfault scope=container":    7,
		"container_oom_events_total" + of:                                                   2,
		"container_oom_events_total" + who:                                                  2,
		"container_threads" + of:                                                            4,
		"container_network_transmit_bytes_total" + who + " interface=eth0":                  20,
		"container_network_receive_packets_total" + who + " interface=eth0":                 3,
		"container_network_receive_packets_dropped_total" + who + " interface=eth0":         4,
		"container_network_transmit_packets_total" + who + " interface=eth0":                5,
		"container_network_transmit_packets_dropped_total" + who + " interface=eth0":        6,
		"container_fs_reads_total" + of + " device=/dev/vda":                                11,
		"container_fs_reads_bytes_total" + of + " device=/dev/vda":                          12,
		"container_fs_writes_total" + of + " device=/dev/vda":                               13,
		"container_fs_writes_bytes_total" + who + " device=/dev/vda":                        14,
		"container_fs_reads_total" + of + " device=/dev/vdb":                                1,
		"container_spec_cpu_period" + of:                                                    50_000,
		"container_spec_cpu_quota" + of:                                                     25_000,
		"container_spec_cpu_shares" + of:                                                    512,
		"container_spec_memory_limit_bytes" + of:                                            1 << 26,
		"container_spec_cpu_quota" + who:                                                    150_000,
		"container_spec_memory_limit_bytes" + who:                                           0,
		"container_fs_usage_bytes" + of + " device=scratch":                                 8192,
		"container_pressure_io_stalled_seconds_total" + who:                                 5,
	} {
		if got, ok := seen[row]; !ok || got != want {
			t.Errorf("%s: %d, %v; want %d", row, got, ok, want)
		}
	}
	for _, row := range []string{"container_last_seen" + of, "container_last_seen" + who, "container_start_time_seconds" + of} {
		if at := int64(seen[row]); at < began || at > time.Now().Unix() {
			t.Errorf("%s: %d; it began at %d", row, at, began)
		}
	}
	if _, ok := seen["container_cpu_cfs_periods_total"+who]; ok {
		t.Error("a pod as a whole has no quota in its guest")
	}
	names := map[string]bool{}
	for row := range seen {
		name, _, _ := strings.Cut(row, " ")
		names[name] = true
	}
	for name := range keys {
		if !names[name] && !strings.HasPrefix(name, "container_pressure_memory_") { // of which the sample has none
			t.Errorf("%s is described, and never there", name)
		}
	}
}

// TestMetricsLeftOut: nothing is made up of what a guest does not tell, of limits that there are not,
// and of containers that have exited, whichever of node and guest knows it first.
func TestMetricsLeftOut(t *testing.T) {
	d := start(t)
	pod, container := d.running(t)
	keys := d.descriptors(t)
	stats := must(sampleStats(container)(t.Context()))(t)
	d.pods.pods[0].stats = func(context.Context) (podvm.PodStats, error) { return stats, nil }
	status := &d.pods.containers[0].status
	has := func(all []*cri.Metric, name string) bool {
		return slices.ContainsFunc(all, func(m *cri.Metric) bool { return m.GetName() == name })
	}

	d.pods.pods[0].status.Config.Resources = nil
	status.Config.Resources = podvm.Resources{CPUQuota: -1, Memory: -1}
	ofPod, ofContainer := d.metrics(t, pod)
	for _, name := range []string{"container_cpu_cfs_periods_total", "container_spec_cpu_quota", "container_spec_cpu_period", "container_spec_cpu_shares"} {
		if has(ofContainer, name) {
			t.Errorf("no limit of CPU, and %s", name)
		}
	}
	if seen := series(t, keys, ofContainer...); !has(ofContainer, specMemory) || has(ofPod, specMemory) {
		t.Errorf("no limit of memory: %v", seen)
	}

	stats.Containers[0].Cgroup.Throttling, stats.Containers[0].Cgroup.Disks = nil, nil
	status.Config.Resources.CPUQuota = 1000
	if _, all := d.metrics(t, pod); has(all, "container_cpu_cfs_periods_total") || has(all, "container_fs_reads_total") || !has(all, "container_spec_cpu_quota") {
		t.Errorf("a kernel that counts neither periods nor I/O: %v", series(t, keys, all...))
	}

	exited := func(who string) {
		if _, all := d.metrics(t, pod); len(all) != 1 || all[0].GetName() != fsUsage || all[0].GetValue().GetValue() != 8192 {
			t.Errorf("%s knows that it has exited: %v", who, series(t, keys, all...))
		}
	}
	status.State = podvm.Exited
	exited("the node")
	status.State = podvm.Running
	stats.Containers[0].Cgroup, stats.Pod = podvm.Cgroup{}, podvm.Cgroup{}
	exited("the guest")
	if ofPod, _ := d.metrics(t, pod); has(ofPod, "container_cpu_usage_seconds_total") || has(ofPod, lastSeen) || !has(ofPod, "container_network_receive_bytes_total") {
		t.Errorf("a pod without a cgroup: %v", series(t, keys, ofPod...))
	}
}

// TestStatsWithoutNetwork: the kubelet takes a default interface for granted, where there are figures.
func TestStatsWithoutNetwork(t *testing.T) {
	for _, list := range [][]podvm.NetStats{nil, {{Name: "lo", RxBytes: 1}}} {
		if u := criNetwork(list, time.Now()); u != nil {
			t.Errorf("of %v it gets %v", list, u)
		}
	}
}
