package passthrough

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// TestLocks has each side exclude the other, and the next owner get what one gives back.
func TestLocks(t *testing.T) {
	for _, kind := range []string{"posix", "ofd", "flock"} {
		t.Run(kind, func(t *testing.T) {
			mnt, host := mounted(t)
			ok(t, os.WriteFile(host+"/file", nil, 0o600))
			for _, sides := range [][2]string{{mnt, host}, {host, mnt}, {mnt, mnt}} {
				first := startChild(t, kind, sides[0]+"/file")
				first.says("locked")
				if err := tryLock(kind, sides[1]+"/file"); !errors.Is(err, unix.EAGAIN) {
					t.Errorf("lock of what is locked, %v: %v", sides, err)
				}
				waiter := startChild(t, kind+"-wait", sides[1]+"/file")
				waiter.says("about to")
				first.end()
				waiter.says("locked")
				if err := tryLock(kind, sides[0]+"/file"); !errors.Is(err, unix.EAGAIN) {
					t.Errorf("lock of what the waiter has, %v: %v", sides, err)
				}
				waiter.end()
				isFree(t, kind, sides[0]+"/file")
			}
		})
	}
}

// isFree waits: FUSE gives a flock and an OFD lock back some time after the close.
func isFree(t *testing.T, kind, path string) {
	t.Helper()
	next := startChild(t, kind+"-wait", path)
	next.says("about to")
	next.says("locked")
	next.end()
}

// tryLock locks as a new owner, and gives it back.
func tryLock(kind, path string) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lock := &unix.Flock_t{Type: unix.F_WRLCK}
	switch kind {
	case "flock":
		return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	case "ofd":
		return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, lock)
	}
	return unix.FcntlFlock(uintptr(fd), unix.F_SETLK, lock)
}

func TestKilledWaiterDies(t *testing.T) {
	for _, kind := range []string{"posix", "flock"} {
		t.Run(kind, func(t *testing.T) {
			mnt, host := mounted(t)
			ok(t, os.WriteFile(host+"/file", nil, 0o600))
			holder := startChild(t, kind, host+"/file")
			holder.says("locked")
			waiter := startChild(t, kind+"-wait", mnt+"/file")
			waiter.says("about to")
			waitBlocked(t, waiter.cmd.Process.Pid)
			ok(t, waiter.cmd.Process.Kill())
			ended := make(chan error, 1)
			go func() { ended <- waiter.cmd.Wait() }()
			select {
			case <-ended:
			case <-time.After(10 * time.Second):
				t.Error("it lives")
			}
			holder.end()
			isFree(t, kind, host+"/file")
		})
	}
}

// waitBlocked waits until the process is in a request for a lock: the kernel has no event for that.
func waitBlocked(t *testing.T, pid int) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		tasks := must(os.ReadDir(procTasks(pid)))(t)
		for _, task := range tasks {
			if wchan, _ := os.ReadFile(procTasks(pid) + "/" + task.Name() + "/syscall"); inLock(string(wchan)) {
				return
			}
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("the waiter does not wait")
}

// TestWaitEnds has cancel, and Close, end a wait, which a guest that goes on locking can't prevent.
func TestWaitEnds(t *testing.T) {
	f := serveDir(t, t.TempDir())
	fh, node := createFile(t, f, "file")
	lock := func(owner uint64) *fuse.LkIn {
		return &fuse.LkIn{
			InHeader: fuse.InHeader{NodeId: node}, Fh: fh, Owner: owner,
			Lk: fuse.FileLock{Typ: unix.F_WRLCK, End: 1<<63 - 1},
		}
	}
	if code := f.SetLk(nil, lock(1)); !code.Ok() {
		t.Fatal(code)
	}
	if code := f.SetLk(nil, lock(2)); code != fuse.EAGAIN {
		t.Errorf("a second owner: %v", code)
	}
	var out fuse.LkOut
	if code := f.GetLk(nil, lock(2), &out); !code.Ok() || out.Lk.Typ != unix.F_WRLCK || out.Lk.End != 1<<63-1 {
		t.Errorf("what is in the way: %v, %+v", code, out)
	}
	if code := f.GetLk(nil, lock(1), &out); !code.Ok() || out.Lk.Typ != unix.F_UNLCK {
		t.Errorf("an owner is in its own way: %v, %+v", code, out)
	}
	cancel := make(chan struct{})
	codes := make(chan fuse.Status)
	go func() { codes <- f.SetLkw(cancel, lock(2)) }()
	close(cancel)
	if code := <-codes; code != fuse.EINTR {
		t.Errorf("after cancel: %v", code)
	}
	tried := make(chan struct{}, 1)
	go func() {
		codes <- fuse.ToStatus(f.wait(nil, func() error {
			select {
			case tried <- struct{}{}:
			default:
			}
			return unix.EAGAIN
		}))
	}()
	<-tried
	f.Close()
	select {
	case code := <-codes:
		if code != fuse.EINTR {
			t.Errorf("after Close: %v", code)
		}
	case <-time.After(10 * time.Second):
		t.Error("it waits after Close")
	}
}

func TestLockRanges(t *testing.T) {
	f := serveDir(t, t.TempDir())
	fh, node := createFile(t, f, "file")
	in := &fuse.LkIn{InHeader: fuse.InHeader{NodeId: node}, Fh: fh, Owner: 1}
	for _, lk := range []fuse.FileLock{
		{Start: 5, End: 4}, {End: 1 << 63}, {Start: 1 << 63, End: 1<<64 - 1}, {Typ: 7, End: 1}, {Typ: 1 << 16, End: 1},
	} {
		in.Lk = lk
		if code := f.SetLk(nil, in); code != fuse.EINVAL {
			t.Errorf("%+v: %v", lk, code)
		}
	}
	// A flush ends the locks of whom it is, not of others.
	for owner := range uint64(2) {
		in.Owner, in.Lk = owner, fuse.FileLock{Typ: unix.F_WRLCK, Start: owner * 10, End: owner*10 + 9}
		if code := f.SetLk(nil, in); !code.Ok() {
			t.Fatal(code)
		}
	}
	if code := f.Flush(nil, &fuse.FlushIn{InHeader: fuse.InHeader{NodeId: node}, Fh: fh, LockOwner: 0}); !code.Ok() {
		t.Fatal(code)
	}
	in.Owner = 2
	for start, want := range map[uint64]fuse.Status{0: fuse.OK, 10: fuse.EAGAIN} {
		in.Lk = fuse.FileLock{Typ: unix.F_WRLCK, Start: start, End: start}
		if code := f.SetLk(nil, in); code != want {
			t.Errorf("byte %d after the flush: %v; want %v", start, code, want)
		}
	}
}

func procTasks(pid int) string { return fmt.Sprintf("/proc/%d/task", pid) }

// inLock reads /proc/.../syscall: its number, and of fcntl also the command.
func inLock(call string) bool {
	fields := strings.Fields(call)
	if len(fields) < 3 {
		return false
	}
	return fields[0] == strconv.Itoa(unix.SYS_FLOCK) ||
		fields[0] == strconv.Itoa(unix.SYS_FCNTL) && fields[2] == fmt.Sprintf("0x%x", unix.F_SETLKW)
}

// createFile makes a file of the share and returns its handle and node.
func createFile(t testing.TB, f *FS, name string) (fh, node uint64) {
	t.Helper()
	var out fuse.CreateOut
	in := &fuse.CreateIn{InHeader: fuse.InHeader{NodeId: fuse.FUSE_ROOT_ID}, Flags: unix.O_RDWR, Mode: 0o600}
	if code := f.Create(nil, in, name, &out); !code.Ok() {
		t.Fatal(code)
	}
	return out.Fh, out.NodeId
}
