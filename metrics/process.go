package metrics

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// ticks per second of /proc/PID/stat: USER_HZ, 100 on every architecture that Linux runs VMs on.
const ticks = 100

// process returns the proportional set size (bytes) and CPU time (seconds) of a process.
// Source: proc(5), smaps_rollup and stat.
func process(pid int) (memory, cpu float64, err error) {
	rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, 0, err
	}
	_, rest, _ := strings.Cut(string(rollup), "\nPss:")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		return 0, 0, fmt.Errorf("process %d has no memory", pid)
	}
	kilobytes, err := strconv.ParseFloat(fields[0], 64)
	if err != nil {
		return 0, 0, err
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	fields = strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 13 {
		return 0, 0, fmt.Errorf("process %d: malformed stat", pid)
	}
	for _, f := range fields[11:13] { // utime, stime
		n, err := strconv.ParseFloat(f, 64)
		if err != nil {
			return 0, 0, err
		}
		cpu += n / ticks
	}
	return kilobytes * 1024, cpu, nil
}
