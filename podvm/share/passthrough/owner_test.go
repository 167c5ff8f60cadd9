package passthrough

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// locker sets locks of a file.
type locker struct {
	t    *testing.T
	f    *FS
	node uint64
}

func (l *locker) lock(fh, owner uint64, kind uint32, start, end uint64) fuse.Status {
	l.t.Helper()
	return l.f.SetLk(nil, &fuse.LkIn{
		InHeader: fuse.InHeader{NodeId: l.node}, Fh: fh, Owner: owner,
		Lk: fuse.FileLock{Typ: kind, Start: start, End: end},
	})
}

// locked locks so many single bytes, none of which touches another.
func (l *locker) locked(fh, owner uint64, bytes ...uint64) {
	l.t.Helper()
	for _, b := range bytes {
		if code := l.lock(fh, owner, unix.F_WRLCK, b, b); !code.Ok() {
			l.t.Fatalf("byte %d: %v", b, code)
		}
	}
}

func (l *locker) counted(want int64) {
	l.t.Helper()
	if got := l.f.locks.ranges.Load(); got != want {
		l.t.Errorf("%d ranges are counted; want %d", got, want)
	}
}

func (l *locker) open() uint64 {
	l.t.Helper()
	var out fuse.OpenOut
	if code := l.f.Open(nil, &fuse.OpenIn{InHeader: fuse.InHeader{NodeId: l.node}, Flags: unix.O_RDWR}, &out); !code.Ok() {
		l.t.Fatal(code)
	}
	return out.Fh
}

func (l *locker) release(fh uint64) {
	l.f.Release(nil, &fuse.ReleaseIn{InHeader: fuse.InHeader{NodeId: l.node}, Fh: fh})
}

func newLocker(t *testing.T) (l *locker, fh uint64) {
	t.Helper()
	l = &locker{t: t, f: serveDir(t, t.TempDir())}
	fh, l.node = createFile(t, l.f, "file")
	return l, fh
}

// TestReleaseUnlocks has the end of a handle end the locks of those who locked by it, and no others.
func TestReleaseUnlocks(t *testing.T) {
	l, first := newLocker(t)
	second, third := l.open(), l.open()
	l.locked(first, 1, 10)
	l.locked(second, 2, 20)
	l.locked(first, 3, 30) // an open file,
	l.locked(third, 3, 40) // and the next with its id
	l.counted(4)
	l.release(first)
	l.counted(3)
	l.locked(second, 4, 10)
	for _, b := range []uint64{20, 30, 40} {
		if code := l.lock(second, 4, unix.F_WRLCK, b, b); code != fuse.EAGAIN {
			t.Errorf("byte %d: %v", b, code)
		}
	}
	if code := l.lock(first, 5, unix.F_WRLCK, 50, 50); code != fuse.EBADF {
		t.Errorf("a lock by a handle that is not: %v", code)
	}
	l.release(third)
	l.release(second)
	l.counted(0)
}

// TestLocksAreCounted has each way to lose locks give back what they count.
func TestLocksAreCounted(t *testing.T) {
	l, fh := newLocker(t)
	for what, end := range map[string]func(){
		"unlock": func() {
			if code := l.lock(fh, 1, unix.F_UNLCK, 0, math.MaxInt64); !code.Ok() {
				t.Error(code)
			}
		},
		"flush": func() {
			l.f.Flush(nil, &fuse.FlushIn{InHeader: fuse.InHeader{NodeId: l.node}, Fh: fh, LockOwner: 1})
		},
		"release": func() { l.release(fh) },
		"release that flushes": func() {
			l.f.Release(nil, &fuse.ReleaseIn{
				InHeader: fuse.InHeader{NodeId: l.node}, Fh: l.open(), ReleaseFlags: fuse.RELEASE_FLUSH, LockOwner: 1,
			})
		},
		"forget": func() {
			l.f.Forget(l.node, 1)
			fh, l.node = createFile(t, l.f, "next")
		},
	} {
		if h, err := l.f.handles.get(fh, regular); err == nil {
			h.put()
		} else {
			fh = l.open()
		}
		l.locked(fh, 1, 1, 3, 5)
		l.counted(3)
		end()
		if l.counted(0); t.Failed() {
			t.Fatal("after " + what)
		}
	}
	l.locked(l.open(), 1, 1, 3, 5) // Close gives back, which serveDir checks
}

func TestLocksAreBounded(t *testing.T) {
	l, fh := newLocker(t)
	const others = maxRanges - 3
	l.f.locks.ranges.Add(others)
	l.locked(fh, 1, 1)
	if code := l.lock(fh, 2, unix.F_WRLCK, 10, 19); !code.Ok() {
		t.Fatal(code)
	}
	l.locked(fh, 1, 3)
	l.counted(maxRanges)
	for what, code := range map[string]fuse.Status{
		"one more":               l.lock(fh, 1, unix.F_WRLCK, 5, 5),
		"an unlock that splits":  l.lock(fh, 2, unix.F_UNLCK, 15, 15),
		"another kind inside":    l.lock(fh, 2, unix.F_RDLCK, 15, 15),
		"another owner's first":  l.lock(fh, 3, unix.F_WRLCK, 100, 100),
		"another kind at an end": l.lock(fh, 2, unix.F_RDLCK, 15, 19),
	} {
		if code != fuse.Status(unix.ENOLCK) {
			t.Errorf("%s: %v", what, code)
		}
	}
	l.counted(maxRanges)
	// What needs no more is possible: here two become one.
	l.locked(fh, 1, 2)
	l.counted(maxRanges - 1)
	if code := l.lock(fh, 2, unix.F_UNLCK, 15, 15); !code.Ok() {
		t.Error(code)
	}
	if code := l.lock(fh, 4, unix.F_WRLCK, 1, 1); code != fuse.EAGAIN {
		t.Errorf("what another has: %v", code)
	}
	l.counted(maxRanges)
	l.f.locks.ranges.Add(-others)
}

// TestRangesAreTheKernels compares with /proc/self/fdinfo.
func TestRangesAreTheKernels(t *testing.T) {
	l, fh := newLocker(t)
	l.locked(fh, 1, 0)
	n := must(l.f.nodes.get(l.node))(t)
	defer n.put()
	o := n.locks.get(1)
	defer o.put()
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 3000 {
		kind := []uint32{unix.F_RDLCK, unix.F_WRLCK, unix.F_UNLCK}[rnd.IntN(3)]
		start := rnd.Uint64N(60)
		end := start + rnd.Uint64N(8)
		if rnd.IntN(30) == 0 {
			end = math.MaxInt64
		}
		if code := l.lock(fh, 1, kind, start, end); !code.Ok() {
			t.Fatal(code)
		}
		want := kernelRanges(t, o.fd)
		if !slices.Equal(o.ranges, want) {
			t.Fatalf("after %d: %v; the kernel has %v", i, o.ranges, want)
		}
		l.counted(int64(len(want)))
	}
}

// kernelRanges are the locks of a descriptor's file.
func kernelRanges(t *testing.T, fd int) (r ranges) {
	t.Helper()
	info := must(os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd)))(t)
	for line := range strings.Lines(string(info)) {
		f := strings.Fields(line) // lock: 1: OFDLCK ADVISORY READ -1 00:00:0 0 EOF
		if f[0] != "lock:" {
			continue
		}
		l := byteRange{kind: unix.F_RDLCK, last: math.MaxInt64}
		if f[4] == "WRITE" {
			l.kind = unix.F_WRLCK
		}
		l.first = must(strconv.ParseUint(f[7], 10, 64))(t)
		if f[8] != "EOF" {
			l.last = must(strconv.ParseUint(f[8], 10, 64))(t)
		}
		r = append(r, l)
	}
	return r
}

// TestWaitersOpenNothing has one wait, and one told that it can't have the lock.
func TestWaitersOpenNothing(t *testing.T) {
	l, fh := newLocker(t)
	l.locked(fh, 1, 1)
	used := l.f.budget.used.Load()
	cancel := make(chan struct{})
	close(cancel)
	in := &fuse.LkIn{
		InHeader: fuse.InHeader{NodeId: l.node}, Fh: fh, Owner: 2,
		Lk: fuse.FileLock{Typ: unix.F_WRLCK, End: 5},
	}
	if code := l.f.SetLkw(cancel, in); code != fuse.EINTR {
		t.Error(code)
	}
	if code := l.f.SetLk(nil, in); code != fuse.EAGAIN {
		t.Error(code)
	}
	if now := l.f.budget.used.Load(); now != used {
		t.Errorf("they have opened %d files", now-used)
	}
}

// TestOwnerIsNotInItsWay has a request of an owner's find the lock of another that was faster.
func TestOwnerIsNotInItsWay(t *testing.T) {
	l, fh := newLocker(t)
	l.locked(fh, 1, 5)
	n := must(l.f.nodes.get(l.node))(t)
	defer n.put()
	h := must(l.f.handles.get(fh, regular))(t)
	defer h.put()
	first := n.locks.get(1)
	defer first.put()
	o, err := l.f.newOwner(n, h, &fuse.LkIn{Fh: fh, Owner: 1}, unix.Flock_t{Type: unix.F_WRLCK, Start: 5, Len: 1})
	if err != nil || o != first {
		t.Fatalf("it is %p, %v; want %p", o, err, first)
	}
	o.put()
}
