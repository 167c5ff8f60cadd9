package podvm

import (
	"regexp"
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

// NetStats counts what went through a network interface.
type NetStats struct {
	Name                                    string
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}

// Cgroup is what the guest's kernel accounts to a group of processes.
type Cgroup struct {
	// Known is false where the guest has no such cgroup, as of a container that has exited: all else is 0.
	Known                        bool
	CPUUsage, CPUUser, CPUSystem time.Duration
	// Throttling is nil where the guest's kernel does not tell.
	Throttling *Throttling
	// MemoryLimit is 0 where there is none.
	MemoryUsage, MemoryWorkingSet, MemoryRSS, MemoryLimit uint64
	// MemoryCache is files and tmpfs; of it are the files mapped, active and inactive.
	MemoryCache, MemoryMappedFile, MemoryActiveFile, MemoryInactiveFile, MemoryKernel uint64
	// MemoryLimitHits is how often the limit kept it from more, OOMKills how many processes that cost.
	MemoryLimitHits, OOMKills uint64
	// PIDs are processes and their threads.
	PageFaults, MajorPageFaults, SwapUsage, PIDs uint64
	// Disks are those that it has read or written, not more than maxDisks.
	Disks []DiskIO
	// Pressure; nil where the guest's kernel does not tell.
	CPUPSI, MemoryPSI, IOPSI *PSI
}

// Throttling is what a limit of CPU time did.
type Throttling struct {
	Periods, ThrottledPeriods uint64
	Throttled                 time.Duration
}

// DiskIO counts what a guest's disk (Device: "vda") has read and written.
type DiskIO struct {
	Device                               string
	Reads, ReadBytes, Writes, WriteBytes uint64
}

// PSI is pressure stall information.
type PSI struct{ Full, Some PSIData }

// PSIData are the stalled time and its shares (percent) over 10, 60 and 300 seconds.
type PSIData struct {
	Total                time.Duration
	Avg10, Avg60, Avg300 float64
}

// What a guest may tell of: each is some series on the node, and all pods' have to fit one answer.
const (
	maxInterfaces = 16
	maxDisks      = 16 // of a cgroup
)

// The names that a guest gives are labels of metrics.
var (
	interfaceName = regexp.MustCompile(`^[!-~]{1,15}$`)
	diskName      = regexp.MustCompile(`^[a-z0-9-]{1,31}$`)
)

// podStats takes a guest's answer as far as it can be true: what is named twice would be one series
// with two values, for which a scrape of all pods may fail.
func podStats(r *agent.StatsResponse) PodStats {
	s := PodStats{
		Time: time.Unix(0, r.TimestampNs), Pod: cgroup(r.Pod),
		MemoryTotal: r.MemoryTotal, MemoryAvailable: r.MemoryAvailable,
	}
	for _, c := range distinct(r.Containers, (*agent.ContainerStats).GetId) {
		s.Containers = append(s.Containers, ContainerStats{c.Id, cgroup(c.Cgroup), c.LayerBytes, c.LayerInodes})
	}
	for _, n := range distinct(r.Network, (*agent.NetStats).GetName) {
		if len(s.Network) < maxInterfaces && interfaceName.MatchString(n.Name) {
			s.Network = append(s.Network, NetStats{
				Name:    n.Name,
				RxBytes: n.RxBytes, RxPackets: n.RxPackets, RxErrors: n.RxErrors, RxDropped: n.RxDropped,
				TxBytes: n.TxBytes, TxPackets: n.TxPackets, TxErrors: n.TxErrors, TxDropped: n.TxDropped,
			})
		}
	}
	return s
}

// distinct are the first ones of each name.
func distinct[T any](all []T, name func(T) string) []T {
	seen := make(map[string]bool)
	var first []T
	for _, one := range all {
		if !seen[name(one)] {
			seen[name(one)] = true
			first = append(first, one)
		}
	}
	return first
}

func cgroup(c *agent.Cgroup) Cgroup {
	if c == nil {
		return Cgroup{}
	}
	return Cgroup{
		Known:    true,
		CPUUsage: time.Duration(c.CpuUsageNs), CPUUser: time.Duration(c.CpuUserNs), CPUSystem: time.Duration(c.CpuSystemNs),
		Throttling:  throttling(c.Throttling),
		MemoryUsage: c.MemoryUsage, MemoryWorkingSet: c.MemoryWorkingSet, MemoryRSS: c.MemoryRss, MemoryLimit: c.MemoryLimit,
		MemoryCache: c.MemoryCache, MemoryMappedFile: c.MemoryMappedFile,
		MemoryActiveFile: c.MemoryActiveFile, MemoryInactiveFile: c.MemoryInactiveFile, MemoryKernel: c.MemoryKernel,
		MemoryLimitHits: c.MemoryLimitHits, OOMKills: c.OomKills,
		PageFaults: c.PageFaults, MajorPageFaults: c.MajorPageFaults, SwapUsage: c.SwapUsage, PIDs: c.Pids,
		Disks:  disks(c.Disks),
		CPUPSI: psi(c.CpuPsi), MemoryPSI: psi(c.MemoryPsi), IOPSI: psi(c.IoPsi),
	}
}

func throttling(t *agent.Throttling) *Throttling {
	if t == nil {
		return nil
	}
	return &Throttling{t.Periods, t.ThrottledPeriods, time.Duration(t.ThrottledNs)}
}

func disks(list []*agent.DiskIO) []DiskIO {
	var all []DiskIO
	for _, d := range distinct(list, (*agent.DiskIO).GetDevice) {
		if len(all) < maxDisks && diskName.MatchString(d.Device) {
			all = append(all, DiskIO{d.Device, d.Reads, d.ReadBytes, d.Writes, d.WriteBytes})
		}
	}
	return all
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
	return PSIData{time.Duration(d.TotalUs) * time.Microsecond, percent(d.Avg10), percent(d.Avg60), percent(d.Avg300)}
}

// percent is a share, if it can be true: no JSON can hold what is no number.
func percent(f float64) float64 {
	if f >= 0 && f <= 100 {
		return f
	}
	return 0
}
