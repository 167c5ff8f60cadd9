package measure

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Weight is what a pod costs its node.
type Weight struct {
	PSS       float64 // bytes, each shared page divided by those who share it
	Processes float64
}

// idDigits of a pod's id are enough to recognise it in a command line or a cgroup's name.
const idDigits = 16

var errNone = errors.New("no process of it found")

// Weigh finds the processes of a pod: those that carry its id in their command line or cgroup
// (VMMs, shims), and all their descendants.
func Weigh(pod string) (Weight, error) {
	entries, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return Weight{}, err
	}
	mine := map[int]bool{}
	parents := map[int]int{}
	for _, dir := range entries {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		parents[pid] = parent(dir)
		for _, name := range []string{"cmdline", "cgroup"} {
			content, _ := os.ReadFile(filepath.Join(dir, name)) // it may have ended since
			if pid != os.Getpid() && bytes.Contains(content, []byte(pod[:idDigits])) {
				mine[pid] = true
			}
		}
	}
	var w Weight
	for pid := range parents {
		if !descends(pid, parents, mine) {
			continue
		}
		if pss, ok := pssOf(pid); ok {
			w.PSS += pss
			w.Processes++
		}
	}
	if w.Processes == 0 {
		return w, fmt.Errorf("pod %s: %w: run as root on the runtime's own machine", pod, errNone)
	}
	return w, nil
}

func descends(pid int, parents map[int]int, from map[int]bool) bool {
	for ; pid > 1; pid = parents[pid] {
		if from[pid] {
			return true
		}
	}
	return false
}

func parent(dir string) int {
	stat, _ := os.ReadFile(filepath.Join(dir, "stat"))
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 2 {
		return 0
	}
	ppid, _ := strconv.Atoi(fields[1])
	return ppid
}

func pssOf(pid int) (float64, bool) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	return kilobytes(string(content), "Pss:"), err == nil
}

// available is the memory that the node could still give, in bytes.
func available() float64 {
	content, _ := os.ReadFile("/proc/meminfo")
	return kilobytes(string(content), "MemAvailable:")
}

func kilobytes(text, key string) float64 {
	_, rest, _ := strings.Cut(text, key)
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		return 0
	}
	n, _ := strconv.ParseFloat(fields[0], 64)
	return n * 1024
}
