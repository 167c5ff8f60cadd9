package podvm

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
)

func TestPodStats(t *testing.T) {
	s := podStats(&agent.StatsResponse{
		Pod: &agent.Cgroup{CpuUsageNs: 5, CpuUserNs: 3, CpuSystemNs: 2, OomKills: 1, MemoryLimitHits: 4, MemoryCache: 6, MemoryKernel: 7},
		Containers: []*agent.ContainerStats{
			{Id: "runs", Cgroup: &agent.Cgroup{
				Throttling: &agent.Throttling{Periods: 9, ThrottledPeriods: 8, ThrottledNs: 7e9},
				Disks:      []*agent.DiskIO{{Device: "vda", Reads: 1, ReadBytes: 2, Writes: 3, WriteBytes: 4}},
			}},
			{Id: "exited", LayerBytes: 5},
		},
		Network: []*agent.NetStats{{Name: "eth0", RxBytes: 1, RxPackets: 2, RxErrors: 3, RxDropped: 4, TxBytes: 5, TxPackets: 6, TxErrors: 7, TxDropped: 8}},
	})
	if p := s.Pod; !p.Known || p.CPUUser != 3 || p.CPUSystem != 2 || p.OOMKills != 1 || p.MemoryLimitHits != 4 || p.MemoryCache != 6 || p.MemoryKernel != 7 || p.Throttling != nil {
		t.Errorf("pod: %+v", p)
	}
	runs, exited := s.Containers[0].Cgroup, s.Containers[1]
	if !runs.Known || *runs.Throttling != (Throttling{9, 8, 7 * time.Second}) || !slices.Equal(runs.Disks, []DiskIO{{"vda", 1, 2, 3, 4}}) {
		t.Errorf("container: %+v", runs)
	}
	if exited.Cgroup.Known || exited.LayerBytes != 5 {
		t.Errorf("exited: %+v", exited)
	}
	if want := (NetStats{"eth0", 1, 2, 3, 4, 5, 6, 7, 8}); len(s.Network) != 1 || s.Network[0] != want {
		t.Errorf("network: %+v", s.Network)
	}
}

// TestPodStatsOfHostileGuest: what it makes up is bounded, has names that can be labels, and none twice.
func TestPodStatsOfHostileGuest(t *testing.T) {
	huge := &agent.Cgroup{CpuUsageNs: math.MaxUint64, Throttling: &agent.Throttling{ThrottledNs: math.MaxUint64}}
	r := &agent.StatsResponse{Containers: []*agent.ContainerStats{{Id: "a", Cgroup: huge}, {Id: "a"}, {Id: "b"}}}
	for _, name := range []string{"", "a name", "net\x00", "\xff", "eth0\n", strings.Repeat("x", 16), "eth0", "eth0"} {
		r.Network = append(r.Network, &agent.NetStats{Name: name})
	}
	for _, name := range []string{"", "../vda", "vda\n", "v d", strings.Repeat("x", 32), "vda", "vda"} {
		huge.Disks = append(huge.Disks, &agent.DiskIO{Device: name})
	}
	s := podStats(r)
	if len(s.Containers) != 2 || !s.Containers[0].Cgroup.Known || s.Containers[1].ID != "b" {
		t.Errorf("containers: %+v", s.Containers)
	}
	if len(s.Network) != 1 || s.Network[0].Name != "eth0" {
		t.Errorf("network: %+v", s.Network)
	}
	if d := s.Containers[0].Cgroup.Disks; len(d) != 1 || d[0].Device != "vda" {
		t.Errorf("disks: %+v", d)
	}
	for i := range 10_000 {
		r.Network = append(r.Network, &agent.NetStats{Name: fmt.Sprint("n", i)})
		huge.Disks = append(huge.Disks, &agent.DiskIO{Device: fmt.Sprint("d", i)})
	}
	s = podStats(r)
	if n, d := len(s.Network), len(s.Containers[0].Cgroup.Disks); n != maxInterfaces || d != maxDisks {
		t.Errorf("%d interfaces and %d disks; want %d and %d", n, d, maxInterfaces, maxDisks)
	}
}

// TestPressureOfHostileGuest: shares are what JSON can hold.
func TestPressureOfHostileGuest(t *testing.T) {
	for given, want := range map[float64]float64{12.5: 12.5, 100: 100, -1: 0, 101: 0, math.Inf(1): 0, math.NaN(): 0} {
		got := psiData(&agent.PSIData{Avg10: given, Avg60: given, Avg300: given})
		if got != (PSIData{Avg10: want, Avg60: want, Avg300: want}) {
			t.Errorf("%v: %+v", given, got)
		}
	}
}
