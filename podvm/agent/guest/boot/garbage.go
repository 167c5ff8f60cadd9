package boot

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// minGarbage is how much there may be before it is collected, in bytes: as much as the runtime's own
// least heap.
const minGarbage = 4 << 20

// collectWhenNeeded has the Go runtime collect garbage when there is as much as there is live memory, as
// ever, but not because two minutes have passed: an agent with nothing to do would walk through all its
// memory, and its VM would need pages of its own for what it has from its template so far.
//
// The runtime leaves the time alone where it goes by a limit instead of a percentage; the limit is set
// anew after each collection.
func collectWhenNeeded() {
	runtime.GC()
	limit := func() { debug.SetMemoryLimit(memoryLimit()) }
	limit()
	debug.SetGCPercent(-1)
	afterCollection(limit)
}

// afterCollection has f called after every collection.
func afterCollection(f func()) {
	type sentinel struct{ p *sentinel }
	runtime.AddCleanup(&sentinel{}, func(struct{}) {
		f()
		afterCollection(f)
	}, struct{}{})
}

// memoryLimit is what the runtime may take by the next collection.
func memoryLimit() int64 {
	sizes := []metrics.Sample{
		{Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/gc/heap/live:bytes"},
	}
	metrics.Read(sizes)
	size := func(i int) int64 { return int64(sizes[i].Value.Uint64()) }
	heapless := size(0) - size(1) - size(2) - size(3)
	live := size(4)
	return heapless + live + max(live, minGarbage)
}
