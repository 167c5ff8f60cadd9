package guest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/caisson-vm/caisson/podvm/agent"
	"google.golang.org/protobuf/proto"
)

// What the files of a cgroup look like, and what is read off each of them.
const (
	cpuStat      = "usage_usec 7000003\nuser_usec 5000002\nsystem_usec 2000001\nnr_periods 40\nnr_throttled 30\nthrottled_usec 1500000\nnr_bursts 0\n"
	memoryStat   = "anon 100\nfile 700\nkernel 50\nkernel_stack 16\nfile_mapped 80\nfile_dirty 1\ninactive_anon 99\nactive_file 200\ninactive_file 500\npgfault 9\npgmajfault 2\n"
	memoryEvents = "low 0\nhigh 6\nmax 5\noom 4\noom_kill 3\noom_group_kill 1\n"
	ioStat       = "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=7 dios=7\n254:16 rbytes=512 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n"
)

func TestCgroupStats(t *testing.T) {
	all := map[string]string{
		"cpu.stat": cpuStat, "memory.stat": memoryStat, "memory.events": memoryEvents, "io.stat": ioStat,
		"memory.current": "900\n", "memory.max": "max\n", "memory.swap.current": "11\n", "pids.current": "12\n",
		"cpu.pressure": "some avg10=1.50 avg60=0.00 avg300=0.00 total=6\n",
	}
	full := &agent.Cgroup{
		CpuUsageNs: 7000003000, CpuUserNs: 5000002000, CpuSystemNs: 2000001000,
		Throttling:  &agent.Throttling{Periods: 40, ThrottledPeriods: 30, ThrottledNs: 1500000000},
		MemoryUsage: 900, MemoryWorkingSet: 400, MemoryRss: 100, MemoryCache: 700, MemoryMappedFile: 80,
		MemoryActiveFile: 200, MemoryInactiveFile: 500, MemoryKernel: 50, MemoryLimitHits: 5, OomKills: 3,
		PageFaults: 9, MajorPageFaults: 2, SwapUsage: 11, Pids: 12,
		Disks: []*agent.DiskIO{
			{Device: "vda", Reads: 1, ReadBytes: 4096, Writes: 2, WriteBytes: 8192},
			{Device: "vdb", Reads: 1, ReadBytes: 512},
		},
		CpuPsi: &agent.PSI{Some: &agent.PSIData{TotalUs: 6, Avg10: 1.5}, Full: &agent.PSIData{}},
	}
	usage := &agent.Cgroup{CpuUsageNs: 7000}
	for name, test := range map[string]struct {
		files map[string]string
		want  *agent.Cgroup
	}{
		"a kernel with all":         {all, full},
		"a kernel without the rest": {map[string]string{"cpu.stat": "usage_usec 7\n"}, usage},
		"empty files": {map[string]string{
			"cpu.stat": "usage_usec 7\n", "memory.stat": "", "memory.events": "", "io.stat": "",
		}, usage},
		"what nobody knows": {map[string]string{
			"cpu.stat": "usage_usec 7\nuser_usec -1\nsystem_usec\n\nnr_bursts 3\n", "memory.stat": "file x\nfile_mapped 99999999999999999999\n",
			"memory.events": "oom_kill\n", "io.stat": "\n254:0\n9:9 rios=1\nrios=1 wios=1\n",
		}, usage},
		"no cgroup": {nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for file, text := range test.files {
				if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			// The last two are of no disk.
			names := diskNames{"254:0": "vda", "254:16": "vdb", "9:9": "", "rios=1": ""}
			if got := cgroupStats(dir, names); !proto.Equal(got, test.want) {
				t.Errorf("got %v; want %v", got, test.want)
			}
		})
	}
}

// TestDiskNames: a name is what /sys links the number to, and is asked for once.
func TestDiskNames(t *testing.T) {
	disks, err := filepath.Glob("/sys/dev/block/*")
	if err != nil || len(disks) == 0 {
		t.Skip("no disks here:", err)
	}
	n := diskNames{}
	number := filepath.Base(disks[0])
	name := n.of(number)
	if _, err := os.Stat("/sys/class/block/" + name); name == "" || err != nil || n[number] != name {
		t.Errorf("%s is %q: %v", number, name, err)
	}
	if name := n.of("4095:1"); name != "" {
		t.Errorf("a disk that is not there is %q", name)
	}
}
