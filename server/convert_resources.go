package server

import (
	"regexp"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/podvm"
)

var (
	cpusetRE   = regexp.MustCompile(`^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$`)
	pageSizeRE = regexp.MustCompile(`^[1-9][0-9]*[KMG]B$`)
	unifiedRE  = regexp.MustCompile(`^[a-z0-9_]+(\.[A-Za-z0-9_]+)+$`)
)

// podResources are those of a pod as a whole, nil where nothing is said of them. A negative limit is none: the
// kubelet subtracts the RuntimeClass's overhead also from the -1 that stands for it.
func podResources(r *cri.LinuxContainerResources) (*podvm.Resources, error) {
	if r == nil {
		return nil, nil
	}
	r = proto.CloneOf(r)
	r.CpuQuota, r.MemoryLimitInBytes = max(r.CpuQuota, -1), max(r.MemoryLimitInBytes, -1)
	res, err := resources(r)
	return &res, err
}

// resources converts and checks limits. In an update 0 leaves a limit as it is, and -1 lifts it.
func resources(r *cri.LinuxContainerResources) (podvm.Resources, error) {
	res := podvm.Resources{
		CPUPeriod: r.GetCpuPeriod(), CPUQuota: r.GetCpuQuota(), CPUShares: r.GetCpuShares(),
		Memory: r.GetMemoryLimitInBytes(), MemorySwap: r.GetMemorySwapLimitInBytes(),
		OOMScoreAdj: r.GetOomScoreAdj(),
		CPUSetCPUs:  r.GetCpusetCpus(), CPUSetMems: r.GetCpusetMems(),
	}
	switch {
	case res.CPUPeriod < 0 || res.CPUPeriod > 1_000_000:
		return res, invalid("cpu_period %d: want at most 1000000 µs", res.CPUPeriod)
	case res.CPUQuota < -1:
		return res, invalid("cpu_quota %d: want µs, or -1 for none", res.CPUQuota)
	case res.CPUShares < 0:
		return res, invalid("cpu_shares %d is negative", res.CPUShares)
	case res.Memory < -1 || res.MemorySwap < -1:
		return res, invalid("memory limit %d, with swap %d: want bytes, or -1 for none", res.Memory, res.MemorySwap)
	case res.OOMScoreAdj < -1000 || res.OOMScoreAdj > 1000:
		return res, invalid("oom_score_adj %d: want -1000 to 1000", res.OOMScoreAdj)
	}
	for _, set := range []string{res.CPUSetCPUs, res.CPUSetMems} {
		if set != "" && !cpusetRE.MatchString(set) {
			return res, invalid("cpuset %q: want a list such as 0-3,7", set)
		}
	}
	for _, l := range r.GetHugepageLimits() {
		if !pageSizeRE.MatchString(l.GetPageSize()) {
			return res, invalid("hugepage size %q: want a size such as 2MB", l.GetPageSize())
		}
		if res.HugepageLimits == nil {
			res.HugepageLimits = map[string]uint64{}
		}
		res.HugepageLimits[l.GetPageSize()] = l.GetLimit()
	}
	for file, value := range r.GetUnified() {
		if !unifiedRE.MatchString(file) || strings.HasPrefix(file, "cgroup.") {
			return res, invalid("unified %q: want the name of a cgroup v2 controller's file", file)
		}
		if strings.ContainsRune(value, 0) {
			return res, invalid("unified %s: the value contains a NUL byte", file)
		}
	}
	res.Unified = r.GetUnified()
	return res, nil
}

// criResources is the way back, for ContainerStatus: what holds, and so no cpuset.
func criResources(r podvm.Resources) *cri.LinuxContainerResources {
	c := &cri.LinuxContainerResources{
		CpuPeriod: r.CPUPeriod, CpuQuota: r.CPUQuota, CpuShares: r.CPUShares,
		MemoryLimitInBytes: r.Memory, MemorySwapLimitInBytes: r.MemorySwap,
		OomScoreAdj: r.OOMScoreAdj, Unified: r.Unified,
	}
	for size, limit := range r.HugepageLimits {
		c.HugepageLimits = append(c.HugepageLimits, &cri.HugepageLimit{PageSize: size, Limit: limit})
	}
	slices.SortFunc(c.HugepageLimits, func(a, b *cri.HugepageLimit) int {
		return strings.Compare(a.GetPageSize(), b.GetPageSize())
	})
	return c
}
