package server

import (
	"sync"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/podvm"
)

func number(n uint64) *cri.UInt64Value { return &cri.UInt64Value{Value: n} }

func (s *runtimeService) criContainerStats(one *sample, cs podvm.ContainerStats) *cri.ContainerStats {
	status, at := one.containers[cs.ID], one.at
	return &cri.ContainerStats{
		Attributes: &cri.ContainerAttributes{
			Id: cs.ID, Metadata: criContainerMetadata(&status.Config),
			Labels: status.Config.Labels, Annotations: status.Config.Annotations,
		},
		Cpu:    s.criCPU(cs.ID, cs.Cgroup, at, status.Started),
		Memory: criMemory(cs.Cgroup, at, 0),
		WritableLayer: &cri.FilesystemUsage{
			Timestamp:  nano(at),
			FsId:       &cri.FilesystemIdentifier{Mountpoint: s.o.Root},
			UsedBytes:  number(cs.LayerBytes),
			InodesUsed: number(cs.LayerInodes),
		},
		Swap: &cri.SwapUsage{Timestamp: nano(at), SwapUsageBytes: number(cs.Cgroup.SwapUsage)},
		Io:   &cri.IoUsage{Timestamp: nano(at), Psi: criPSI(cs.Cgroup.IOPSI)},
	}
}

func (s *runtimeService) criPodStats(one *sample) *cri.PodSandboxStats {
	status, at, group := one.status, one.at, one.stats.Pod
	linux := &cri.LinuxPodSandboxStats{
		Cpu:     s.criCPU(status.ID, group, at, status.Created),
		Memory:  criMemory(group, at, one.stats.MemoryTotal),
		Network: criNetwork(one.stats.Network, at),
		Process: &cri.ProcessUsage{Timestamp: nano(at), ProcessCount: number(group.PIDs)},
		Io:      &cri.IoUsage{Timestamp: nano(at), Psi: criPSI(group.IOPSI)},
	}
	for _, cs := range one.stats.Containers {
		if _, known := one.containers[cs.ID]; known {
			linux.Containers = append(linux.Containers, s.criContainerStats(one, cs))
		}
	}
	return &cri.PodSandboxStats{
		Attributes: &cri.PodSandboxAttributes{
			Id: status.ID, Metadata: criPodMetadata(&status.Config),
			Labels: status.Config.Labels, Annotations: status.Config.Annotations,
		},
		Linux: linux,
	}
}

func (s *runtimeService) criCPU(id string, g podvm.Cgroup, at, started time.Time) *cri.CpuUsage {
	usage := uint64(max(g.CPUUsage, 0))
	return &cri.CpuUsage{
		Timestamp:            nano(at),
		UsageCoreNanoSeconds: number(usage),
		UsageNanoCores:       number(s.rates.nanoCores(id, usage, at, started)),
		Psi:                  criPSI(g.CPUPSI),
	}
}

// criMemory: what is available is counted against the cgroup's limit, else against the VM's memory
// (total, 0 where that is not for this cgroup to say).
func criMemory(g podvm.Cgroup, at time.Time, total uint64) *cri.MemoryUsage {
	m := &cri.MemoryUsage{
		Timestamp:       nano(at),
		WorkingSetBytes: number(g.MemoryWorkingSet),
		UsageBytes:      number(g.MemoryUsage),
		RssBytes:        number(g.MemoryRSS),
		PageFaults:      number(g.PageFaults),
		MajorPageFaults: number(g.MajorPageFaults),
		Psi:             criPSI(g.MemoryPSI),
	}
	limit := g.MemoryLimit
	if limit == 0 {
		limit = total
	}
	if limit > 0 {
		m.AvailableBytes = number(limit - min(limit, g.MemoryWorkingSet))
	}
	return m
}

// criNetwork: the default interface is eth0, else the first; nil where there is none, because the kubelet
// takes it for granted.
func criNetwork(list []podvm.NetStats, at time.Time) *cri.NetworkUsage {
	u := &cri.NetworkUsage{Timestamp: nano(at)}
	for _, n := range list {
		if n.Name == "lo" {
			continue
		}
		c := &cri.NetworkInterfaceUsage{
			Name:    n.Name,
			RxBytes: number(n.RxBytes), RxErrors: number(n.RxErrors),
			TxBytes: number(n.TxBytes), TxErrors: number(n.TxErrors),
		}
		switch {
		case u.DefaultInterface == nil:
			u.DefaultInterface = c
		case n.Name == "eth0":
			u.Interfaces = append(u.Interfaces, u.DefaultInterface)
			u.DefaultInterface = c
		default:
			u.Interfaces = append(u.Interfaces, c)
		}
	}
	if u.DefaultInterface == nil {
		return nil
	}
	return u
}

func criPSI(p *podvm.PSI) *cri.PsiStats {
	if p == nil {
		return nil
	}
	data := func(d podvm.PSIData) *cri.PsiData {
		return &cri.PsiData{Total: uint64(max(d.Total, 0)), Avg10: d.Avg10, Avg60: d.Avg60, Avg300: d.Avg300}
	}
	return &cri.PsiStats{Full: data(p.Full), Some: data(p.Some)}
}

// A rate is measured anew when the last measurement is this old, and forgotten when nobody has
// asked for it for long.
const (
	rateWindow = time.Second
	rateKeep   = 10 * time.Minute
)

// rates turns cumulative CPU time into its rate of change between successive samples.
type rates struct {
	mu   sync.Mutex
	last map[string]rate // by pod's or container's id
}

type rate struct {
	usage     uint64 // ns
	at        time.Time
	nanoCores uint64
}

func newRates() *rates { return &rates{last: map[string]rate{}} }

// nanoCores is the CPU time, in ns, used per second since the last sample; for the first sample,
// since the start. A counter that ran backwards (a guest can say anything) counts as a start.
func (r *rates) nanoCores(id string, usage uint64, at, started time.Time) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	last, ok := r.last[id]
	if ok && usage >= last.usage && !at.Before(last.at) && at.Sub(last.at) < rateWindow {
		return last.nanoCores
	}
	if !ok || usage < last.usage || !at.After(last.at) {
		last = rate{at: started}
	}
	now := rate{usage: usage, at: at}
	if span := at.Sub(last.at); span > 0 && !last.at.IsZero() {
		now.nanoCores = uint64(float64(usage-last.usage) / span.Seconds())
	}
	r.last[id] = now
	return now.nanoCores
}

// prune forgets what has not been asked for of late.
func (r *rates) prune(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, last := range r.last {
		if now.Sub(last.at) > rateKeep {
			delete(r.last, id)
		}
	}
}
