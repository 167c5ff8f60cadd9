package boot

import (
	"runtime"
	"runtime/debug"
	"testing"
)

var (
	kept    [][]byte
	dropped []byte
)

// TestGarbageIsCollected: without its percentage the runtime collects as often as with it.
func TestGarbageIsCollected(t *testing.T) {
	percent, limit := debug.SetGCPercent(100), debug.SetMemoryLimit(-1)
	defer func() {
		kept = nil
		debug.SetGCPercent(percent)
		debug.SetMemoryLimit(limit)
	}()
	collectWhenNeeded()
	if percent := debug.SetGCPercent(-1); percent != -1 {
		t.Errorf("the percentage is %d, and so time counts", percent)
	}
	for _, live := range []int{0, 32 << 20} {
		for size := 0; size < live; size += 64 << 10 {
			kept = append(kept, make([]byte, 64<<10))
		}
		runtime.GC() // the first after the heap has grown
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		const garbage = 1 << 30
		for range garbage / (16 << 10) {
			dropped = make([]byte, 16<<10)
		}
		runtime.ReadMemStats(&after)
		often, most := after.NumGC-before.NumGC, uint32(4*garbage/max(live, minGarbage))
		if often < most/16 || often > most {
			t.Errorf("with %d MiB live %d collections for 1 GiB, at most %d are right", live>>20, often, most)
		}
	}
}
