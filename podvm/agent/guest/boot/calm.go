package boot

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
)

// monitorSlack is by how much the runtime's monitor may wake up late, in ns.
const monitorSlack = 2_000_000

// calm lets the Go runtime's monitor thread, and no other, sleep longer than it asks for. Whenever the
// agent has something to do it begins by sleeping 50 times for 20 us, and in a VM each time is a timer
// that is set, an interrupt and its end: three exits to the host. What the monitor is for can wait: it
// takes a processor from a goroutine that has it for too long, or is in the kernel with it.
//
// The other threads keep their slack, because what they start inherits it.
// Source: sysmon of the Go runtime, whose thread is the first that it makes.
func calm() error {
	tid, err := monitorThread("/proc/self/task")
	if err != nil {
		return err
	}
	return write(fmt.Sprintf("/proc/%d/timerslack_ns", tid), strconv.Itoa(monitorSlack))
}

// monitorThread is the second oldest of the threads.
func monitorThread(tasks string) (int, error) {
	entries, err := os.ReadDir(tasks)
	if err != nil {
		return 0, fmt.Errorf("list threads: %w", err)
	}
	var tids []int
	for _, e := range entries {
		tid, err := strconv.Atoi(e.Name())
		if err != nil {
			return 0, fmt.Errorf("list threads: %w", err)
		}
		tids = append(tids, tid)
	}
	if len(tids) < 2 {
		return 0, errors.New("the Go runtime has no monitor thread")
	}
	slices.Sort(tids)
	return tids[1], nil
}
