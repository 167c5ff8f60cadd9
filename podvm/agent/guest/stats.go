package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// stats reads what the pod uses now.
func (a *Agent) stats(ctx context.Context) (*agent.StatsResponse, error) {
	resp := &agent.StatsResponse{TimestampNs: time.Now().UnixNano()}
	names := diskNames{}
	if !a.o.NoCgroups {
		resp.Pod = cgroupStats(podCgroup, names)
	}
	resp.MemoryTotal, resp.MemoryAvailable = memory()
	_, quotas := a.storage()
	for _, c := range a.living() {
		s := &agent.ContainerStats{Id: c.id}
		if !a.o.NoCgroups && c.now().State != agent.State_STATE_EXITED {
			s.Cgroup = cgroupStats(c.cgroupDir(), names)
		}
		var err error
		if s.LayerBytes, s.LayerInodes, err = quotas.usage(ctx, c.project, c.layer); err != nil {
			return nil, fmt.Errorf("size of the writable layer of %s: %w", c.id, err)
		}
		resp.Containers = append(resp.Containers, s)
	}
	var err error
	resp.Network, err = netStats()
	return resp, err
}

// living are the containers that were created.
func (a *Agent) living() []*container {
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []*container
	for _, c := range a.containers {
		if c.now() != nil {
			all = append(all, c)
		}
	}
	return all
}

// cgroupStats reads a cgroup's files, each once; what the kernel does not have is 0. It is nil where
// there is no such cgroup: cpu.stat is in each.
func cgroupStats(dir string, names diskNames) *agent.Cgroup {
	file := func(name string) string { return readFile(filepath.Join(dir, name)) }
	cpu := file("cpu.stat")
	if cpu == "" {
		return nil
	}
	memory, events := file("memory.stat"), file("memory.events")
	c := &agent.Cgroup{
		CpuUsageNs:         keyed(cpu, "usage_usec") * 1000,
		CpuUserNs:          keyed(cpu, "user_usec") * 1000,
		CpuSystemNs:        keyed(cpu, "system_usec") * 1000,
		Throttling:         throttling(cpu),
		MemoryUsage:        number(file("memory.current")),
		MemoryRss:          keyed(memory, "anon"),
		MemoryCache:        keyed(memory, "file"),
		MemoryMappedFile:   keyed(memory, "file_mapped"),
		MemoryActiveFile:   keyed(memory, "active_file"),
		MemoryInactiveFile: keyed(memory, "inactive_file"),
		MemoryKernel:       keyed(memory, "kernel"),
		MemoryLimit:        number(file("memory.max")),
		MemoryLimitHits:    keyed(events, "max"),
		OomKills:           keyed(events, "oom_kill"),
		PageFaults:         keyed(memory, "pgfault"),
		MajorPageFaults:    keyed(memory, "pgmajfault"),
		SwapUsage:          number(file("memory.swap.current")),
		Pids:               number(file("pids.current")),
		Disks:              diskIO(file("io.stat"), names),
		CpuPsi:             pressure(file("cpu.pressure")),
		MemoryPsi:          pressure(file("memory.pressure")),
		IoPsi:              pressure(file("io.pressure")),
	}
	// What the kernel would take back first does not count as in use, as in cAdvisor.
	if c.MemoryInactiveFile < c.MemoryUsage {
		c.MemoryWorkingSet = c.MemoryUsage - c.MemoryInactiveFile
	}
	return c
}

// throttling reads it off cpu.stat; nil from a kernel that limits no CPU time.
func throttling(cpu string) *agent.Throttling {
	if !strings.Contains(cpu, "nr_periods ") {
		return nil
	}
	return &agent.Throttling{
		Periods:          keyed(cpu, "nr_periods"),
		ThrottledPeriods: keyed(cpu, "nr_throttled"),
		ThrottledNs:      keyed(cpu, "throttled_usec") * 1000,
	}
}

// diskIO reads io.stat. A disk without counters or name, as one that is being unplugged, is left out.
// Source: Documentation/admin-guide/cgroup-v2.rst of the Linux kernel.
func diskIO(text string, names diskNames) []*agent.DiskIO {
	var all []*agent.DiskIO
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		d := &agent.DiskIO{Device: names.of(fields[0])}
		if d.Device == "" {
			continue
		}
		for _, field := range fields[1:] {
			key, value, _ := strings.Cut(field, "=")
			switch key {
			case "rios":
				d.Reads = number(value)
			case "rbytes":
				d.ReadBytes = number(value)
			case "wios":
				d.Writes = number(value)
			case "wbytes":
				d.WriteBytes = number(value)
			}
		}
		all = append(all, d)
	}
	return all
}

// diskNames are the kernel's names of disks by "major:minor", looked up once each.
type diskNames map[string]string

// of is "" where the kernel has no such disk.
func (n diskNames) of(number string) string {
	name, known := n[number]
	if !known {
		if target, err := os.Readlink("/sys/dev/block/" + number); err == nil {
			name = filepath.Base(target)
		}
		n[number] = name
	}
	return name
}

// pressure reads a PSI file. Source: Documentation/accounting/psi.rst of the Linux kernel.
func pressure(text string) *agent.PSI {
	if text == "" {
		return nil
	}
	p := &agent.PSI{Some: &agent.PSIData{}, Full: &agent.PSIData{}}
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		d := p.Some
		if fields[0] == "full" {
			d = p.Full
		}
		for _, field := range fields[1:] {
			key, value, _ := strings.Cut(field, "=")
			switch key {
			case "avg10":
				d.Avg10 = fraction(value)
			case "avg60":
				d.Avg60 = fraction(value)
			case "avg300":
				d.Avg300 = fraction(value)
			case "total":
				d.TotalUs = number(value)
			}
		}
	}
	return p
}

func fraction(s string) float64 {
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return 0
	}
	return f
}

// memory is the guest's, in bytes.
func memory() (total, available uint64) {
	for line := range strings.Lines(readFile("/proc/meminfo")) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "MemTotal:":
			total = number(fields[1]) << 10
		case "MemAvailable:":
			available = number(fields[1]) << 10
		}
	}
	return total, available
}

func netStats() ([]*agent.NetStats, error) {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("network counters: %w", err)
	}
	var all []*agent.NetStats
	for _, link := range links {
		attrs := link.Attrs()
		s := attrs.Statistics
		if attrs.Name == "lo" || s == nil {
			continue
		}
		all = append(all, &agent.NetStats{
			Name:    attrs.Name,
			RxBytes: s.RxBytes, RxPackets: s.RxPackets, RxErrors: s.RxErrors, RxDropped: s.RxDropped,
			TxBytes: s.TxBytes, TxPackets: s.TxPackets, TxErrors: s.TxErrors, TxDropped: s.TxDropped,
		})
	}
	return all, nil
}

// diskUsage adds up a directory, as du does: files with several links count once.
func diskUsage(ctx context.Context, dir string) (bytes, inodes uint64, err error) {
	linked := make(map[uint64]bool)
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // deleted meanwhile
		} else if err != nil {
			return err
		}
		var st unix.Stat_t
		if unix.Lstat(path, &st) != nil {
			return nil
		}
		if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if linked[st.Ino] {
				return nil
			}
			linked[st.Ino] = true
		}
		bytes += uint64(st.Blocks) * 512
		inodes++
		return ctx.Err()
	})
	return bytes, inodes, err
}
