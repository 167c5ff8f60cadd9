package podvm

import (
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// PodStats is what a pod and its containers use, as the guest tells it. Sizes are bytes.
type PodStats struct {
	// Time is the guest's clock when it looked.
	Time time.Time
	// Pod is all of the guest's workload together.
	Pod        Cgroup
	Containers []ContainerStats
	Network    []NetStats
	Volumes    []VolumeStats
	// MemoryTotal and MemoryAvailable are the guest's.
	MemoryTotal, MemoryAvailable uint64
}

// ContainerStats is what one container uses.
type ContainerStats struct {
	ID     string
	Cgroup Cgroup
	// LayerBytes and LayerInodes are those of its writable layer.
	LayerBytes, LayerInodes uint64
}

// VolumeStats is what an emptyDir uses.
type VolumeStats struct {
	Name          string
	Bytes, Inodes uint64
}

// NetStats counts a network interface's bytes and errors.
type NetStats struct {
	Name                                 string
	RxBytes, RxErrors, TxBytes, TxErrors uint64
}

// Cgroup is what the guest's kernel accounts to a group of processes.
type Cgroup struct {
	CPUUsage time.Duration
	// MemoryLimit is 0 where there is none.
	MemoryUsage, MemoryWorkingSet, MemoryRSS, MemoryLimit uint64
	PageFaults, MajorPageFaults, SwapUsage, PIDs          uint64
	// Pressure; nil where the guest's kernel does not tell.
	CPUPSI, MemoryPSI, IOPSI *PSI
}

// PSI is pressure stall information.
type PSI struct{ Full, Some PSIData }

// PSIData are the stalled time and its shares (percent) over 10, 60 and 300 seconds.
type PSIData struct {
	Total                time.Duration
	Avg10, Avg60, Avg300 float64
}

func podStats(r *agent.StatsResponse) PodStats {
	s := PodStats{
		Time: time.Unix(0, r.TimestampNs), Pod: cgroup(r.Pod),
		MemoryTotal: r.MemoryTotal, MemoryAvailable: r.MemoryAvailable,
	}
	for _, c := range r.Containers {
		s.Containers = append(s.Containers, ContainerStats{c.Id, cgroup(c.Cgroup), c.LayerBytes, c.LayerInodes})
	}
	for _, n := range r.Network {
		s.Network = append(s.Network, NetStats{n.Name, n.RxBytes, n.RxErrors, n.TxBytes, n.TxErrors})
	}
	for _, v := range r.Volumes {
		s.Volumes = append(s.Volumes, VolumeStats{v.Name, v.Bytes, v.Inodes})
	}
	return s
}

func cgroup(c *agent.Cgroup) Cgroup {
	if c == nil {
		return Cgroup{}
	}
	return Cgroup{
		CPUUsage:    time.Duration(c.CpuUsageNs),
		MemoryUsage: c.MemoryUsage, MemoryWorkingSet: c.MemoryWorkingSet, MemoryRSS: c.MemoryRss, MemoryLimit: c.MemoryLimit,
		PageFaults: c.PageFaults, MajorPageFaults: c.MajorPageFaults, SwapUsage: c.SwapUsage, PIDs: c.Pids,
		CPUPSI: psi(c.CpuPsi), MemoryPSI: psi(c.MemoryPsi), IOPSI: psi(c.IoPsi),
	}
}

func psi(p *agent.PSI) *PSI {
	if p == nil {
		return nil
	}
	return &PSI{Full: psiData(p.Full), Some: psiData(p.Some)}
}

func psiData(d *agent.PSIData) PSIData {
	if d == nil {
		return PSIData{}
	}
	return PSIData{time.Duration(d.TotalUs) * time.Microsecond, d.Avg10, d.Avg60, d.Avg300}
}
