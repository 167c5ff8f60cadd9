package guest

import (
	"math"
	"runtime/debug"
	"testing"
	"time"
)

// TestCollectLate: the collector rests until the agent has grown, and then works as ever.
func TestCollectLate(t *testing.T) {
	t.Cleanup(func() {
		debug.SetGCPercent(100)
		debug.SetMemoryLimit(math.MaxInt64)
	})
	collectLate()
	percent := debug.SetGCPercent(-1)
	if limit := debug.SetMemoryLimit(-1); percent != -1 || limit == math.MaxInt64 {
		t.Fatalf("the collector begins at %d %%, or %d bytes", percent, limit)
	}
	var garbage []byte
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		garbage = make([]byte, 64<<10)
		if debug.SetMemoryLimit(-1) == math.MaxInt64 {
			break
		}
	}
	if percent := debug.SetGCPercent(100); percent != 100 || len(garbage) == 0 {
		t.Errorf("after a collection the next begins at %d %%", percent)
	}
}
