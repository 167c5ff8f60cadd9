package passthrough

import (
	"math"
	"slices"
	"sort"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// maxRanges bounds the byte ranges that are locked in a directory: for the host they are memory of
// its kernel that no cgroup counts.
const maxRanges = 16 << 10

// lockCount counts the ranges that are locked in a directory.
type lockCount struct{ ranges atomic.Int64 }

// take adds n ranges, if there is room for them. Less than none are none.
func (c *lockCount) take(n int) bool {
	if n <= 0 || c.ranges.Add(int64(n)) <= maxRanges {
		return true
	}
	c.give(n)
	return false
}

// give takes n ranges back. Less than none are none.
func (c *lockCount) give(n int) { c.ranges.Add(-int64(max(n, 0))) }

// byteRange is locked from its first to its last byte.
type byteRange struct {
	first, last uint64
	kind        int16
}

// ranges are what an owner has locked as the kernel has it: in order, without overlaps, and those
// of one kind that touch are one. Source: posix_lock_inode in fs/locks.c.
type ranges []byteRange

// change returns what a lock does: it replaces those from one index to before another.
func (r ranges) change(lock *unix.Flock_t) (from, to int, with []byteRange) {
	l := byteRange{uint64(lock.Start), math.MaxInt64, lock.Type}
	if lock.Len > 0 {
		l.last = l.first + uint64(lock.Len) - 1
	}
	first, last := l.first, l.last
	// Those that overlap or touch it.
	from = sort.Search(len(r), func(i int) bool { return r[i].last+1 >= first })
	to = from + sort.Search(len(r)-from, func(i int) bool { return r[from+i].first > last+1 })
	var before, after []byteRange
	for _, have := range r[from:to] {
		if have.kind == l.kind {
			l.first, l.last = min(l.first, have.first), max(l.last, have.last)
			continue
		}
		if have.first < first {
			before = append(before, byteRange{have.first, min(have.last, first-1), have.kind})
		}
		if have.last > last {
			after = append(after, byteRange{max(have.first, last+1), have.last, have.kind})
		}
	}
	if l.kind != unix.F_UNLCK {
		before = append(before, l)
	}
	return from, to, append(before, after...)
}

// replace makes a change. Few ranges do not keep the memory of many.
func (r ranges) replace(from, to int, with []byteRange) ranges {
	r = slices.Replace(r, from, to, with...)
	if len(r) == 0 {
		return nil
	}
	if cap(r) > 4*len(r)+16 {
		return slices.Clone(r)
	}
	return r
}
