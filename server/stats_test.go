package server

import (
	"context"
	"errors"
	"fmt"
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
		CPUUsage: 90 * time.Second, MemoryUsage: 300, MemoryWorkingSet: 200, MemoryRSS: 100, PageFaults: 7, MajorPageFaults: 1, PIDs: 4,
		CPUPSI: psi(3 * time.Second), IOPSI: psi(5 * time.Second),
	}
	limited := group
	limited.MemoryLimit = 150
	return func(context.Context) (podvm.PodStats, error) {
		return podvm.PodStats{
			Pod: group, MemoryTotal: 1000,
			Containers: []podvm.ContainerStats{{ID: container, Cgroup: limited, LayerBytes: 8192, LayerInodes: 3}, {ID: "made-up"}},
			Network:    []podvm.NetStats{{Name: "lo", RxBytes: 99}, {Name: "net1", RxBytes: 1}, {Name: "eth0", RxBytes: 10, TxBytes: 20, TxErrors: 2}},
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

// TestMetrics: what the kubelet is given it can translate, or it drops it.
func TestMetrics(t *testing.T) {
	d := start(t)
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)
	pod, container := d.running(t)
	d.pods.pods[0].stats = sampleStats(container)
	keys := map[string][]string{}
	for _, m := range must(c.ListMetricDescriptors(ctx, &cri.ListMetricDescriptorsRequest{}))(t).GetDescriptors() {
		if keys[m.GetName()] != nil || m.GetHelp() == "" {
			t.Errorf("descriptor %v: twice, or without help", m)
		}
		keys[m.GetName()] = m.GetLabelKeys()
	}
	all := must(c.ListPodSandboxMetrics(ctx, &cri.ListPodSandboxMetricsRequest{}))(t).GetPodMetrics()
	if len(all) != 1 || all[0].GetPodSandboxId() != pod || len(all[0].GetContainerMetrics()) != 1 {
		t.Fatalf("metrics: %v", all)
	}
	seen := map[string]uint64{}
	for _, m := range append(all[0].GetMetrics(), all[0].GetContainerMetrics()[0].GetMetrics()...) {
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
	who := " namespace=shop pod=web-0"
	of := " container=nginx image=busybox:1 name=" + container + who
	for row, want := range map[string]uint64{
		"container_cpu_usage_seconds_total" + who + " cpu=total":                            90,
		"container_cpu_usage_seconds_total" + of + " cpu=total":                             90,
		"container_memory_working_set_bytes" + of:                                           200,
		"container_memory_failures_total" + of + " failure_type=pgmajfault scope=hierarchy": 1,
		"container_network_transmit_bytes_total" + who + " interface=eth0":                  20,
		"container_spec_memory_limit_bytes" + of:                                            150,
		"container_fs_usage_bytes" + of + " device=scratch":                                 8192,
		"container_pressure_io_stalled_seconds_total" + who:                                 5,
	} {
		if got, ok := seen[row]; !ok || got != want {
			t.Errorf("%s: %d, %v; want %d", row, got, ok, want)
		}
	}
	if _, ok := seen["container_start_time_seconds"+of]; !ok {
		t.Error("no start time")
	}
}
