package passthrough

import (
	"fmt"
	"math"
	"os"
	"testing"
	"time"

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

// TestScarce has a kernel in place of a guest's know more files than there may be, which it forgets when the
// budget asks for it. What it uses stays as it is.
func TestScarce(t *testing.T) {
	const budget, dirs, each = 400, 30, 40
	mnt, host, f, _ := mountedFS(t)
	f.budget.all.left.Add(1)
	f.budget.all = newFiles(budget)
	f.budget.all.left.Add(-1)
	var names []string
	for i := range dirs {
		dir := fmt.Sprintf("/top%d/a/dir%d", i%3, i)
		ok(t, os.MkdirAll(host+dir, 0o755))
		for j := range each {
			names = append(names, fmt.Sprintf("%s/file%d", dir, j))
			ok(t, os.WriteFile(host+names[len(names)-1], nil, 0o600))
		}
	}
	open := must(os.Open(mnt + names[0]))(t)
	defer open.Close()
	ok(t, unix.Mount("tmpfs", mnt+"/top1/a", "tmpfs", 0, ""))
	defer func() { ok(t, unix.Unmount(mnt+"/top1/a", 0)) }()
	ok(t, os.WriteFile(mnt+"/top1/a/on-top", nil, 0o600))
	times := 0
	for _, name := range names {
		if name[:len("/top1")] == "/top1" {
			continue
		}
		if err := os.Lchown(mnt+name, 1000, 1000); err != nil {
			t.Fatalf("%s, after it was told to forget %d times: %v", name, times, err)
		}
		select {
		case <-f.budget.all.scarce:
			times++
			// As the guest's agent does.
			ok(t, unix.Mount("", mnt, "", unix.MS_REMOUNT|unix.MS_NODEV, ""))
			f.forgetsAllBut(t, budget/10)
		default:
		}
	}
	if times < 2 {
		t.Errorf("it was told %d times", times)
	}
	lstat(t, mnt+"/top1/a/on-top")
	if path := must(os.Readlink(procPath(int(open.Fd()))))(t); path != mnt+names[0] {
		t.Errorf("what was open is %s", path)
	}
}

// forgetsAllBut waits until the guest knows no more than so many files, of which there is no event.
func (f *FS) forgetsAllBut(t *testing.T, most int64) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); f.budget.used.Load() > most; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it knows %d files; want %d", f.budget.used.Load(), most)
		}
	}
}
