package passthrough

import (
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// spareFiles are left of RLIMIT_NOFILE for the process itself and for what requests have open
	// until they end. Of a small limit it is a quarter.
	spareFiles = 2048
	// leastFiles are the least that RLIMIT_NOFILE may be.
	leastFiles = 512
	// maxFiles bounds what all directories have open: each is memory of the host's kernel.
	maxFiles = 256 << 10
)

// files are what all directories of the process may still have open, as RLIMIT_NOFILE is the
// process's.
type files struct {
	left atomic.Int64
	few  int64 // with fewer left they are scarce
	// scarce receives when one is taken then.
	scarce chan struct{}
}

func newFiles(n int64) *files {
	f := &files{few: n / 4, scarce: make(chan struct{}, 1)}
	f.left.Store(n)
	return f
}

// Scarce receives when a guest comes to know or open a file, and less than a quarter is left of
// those that all directories of the process may have.
func Scarce() (<-chan struct{}, error) {
	f, err := ownFiles()
	if err != nil {
		return nil, err
	}
	return f.scarce, nil
}

// IsScarce tells whether less than a quarter is left.
func IsScarce() bool {
	f, err := ownFiles()
	return err == nil && f.isScarce()
}

func (f *files) isScarce() bool { return f.left.Load() < f.few }

// take takes one of those that are left, if there is one.
func (f *files) take() bool {
	left := f.left.Add(-1)
	if left < f.few {
		select {
		case f.scarce <- struct{}{}:
		default:
		}
	}
	if left < 0 {
		f.left.Add(1)
	}
	return left >= 0
}

var ownFiles = sync.OnceValues(func() (*files, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, fmt.Errorf("read RLIMIT_NOFILE: %w", err)
	}
	n, err := filesFor(limit.Cur)
	if err != nil {
		return nil, err
	}
	return newFiles(n), nil
})

// filesFor is how many files the guests may have open when the process may have limit.
func filesFor(limit uint64) (int64, error) {
	if limit < leastFiles {
		return 0, fmt.Errorf("RLIMIT_NOFILE is %d; raise it to %d or more", limit, leastFiles)
	}
	return int64(min(limit-min(spareFiles, limit/4), maxFiles)), nil
}

// budget counts what one directory has open of what all may.
type budget struct {
	all  *files
	used atomic.Int64
}

// take adds a descriptor, if one is left.
func (b *budget) take() bool {
	if !b.all.take() {
		return false
	}
	b.used.Add(1)
	return true
}

// takeRoot adds a directory's own, which the guest has no part in.
func (b *budget) takeRoot() {
	b.all.left.Add(-1)
	b.used.Add(1)
}

func (b *budget) give() {
	b.used.Add(-1)
	b.all.left.Add(1)
}
