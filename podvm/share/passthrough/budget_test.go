package passthrough

import (
	"math"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func TestFilesFor(t *testing.T) {
	for limit, want := range map[uint64]int64{
		0: -1, 511: -1, 512: 384, 1024: 768, 8192: 6144, 20_000: 20_000 - 2048,
		1 << 20: 262_144, math.MaxUint64: 262_144,
	} {
		got, err := filesFor(limit)
		if want < 0 && err == nil || want >= 0 && (err != nil || got != want) {
			t.Errorf("RLIMIT_NOFILE %d: %d, %v; want %d", limit, got, err, want)
		}
	}
}

// TestBudgetIsShared has one directory leave nothing to another.
func TestBudgetIsShared(t *testing.T) {
	_, host := hostileDirs(t)
	a, b := serveDir(t, host), serveDir(t, host)
	first, second := newGuest(t, a), newGuest(t, b)
	take := a.budget.all.left.Load() - 1
	a.budget.all.left.Add(-take)
	node, code := first.lookup(fuse.FUSE_ROOT_ID, "inside")
	if code != 0 {
		t.Error(code)
	}
	if _, code := second.lookup(fuse.FUSE_ROOT_ID, "inside"); code != unix.EMFILE {
		t.Errorf("when another directory has all: %v", code)
	}
	a.Forget(node, 1)
	if _, code := second.lookup(fuse.FUSE_ROOT_ID, "inside"); code != 0 {
		t.Errorf("when it has given back: %v", code)
	}
	a.budget.all.left.Add(take)
}
