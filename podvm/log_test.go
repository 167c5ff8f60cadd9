package podvm

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// someRecords are n records as an agent makes them, and the lines that they are to become.
func someRecords(r *rand.Rand, n int) (all []agent.Record, lines []byte) {
	offset := uint64(0)
	for i := range n {
		line := fmt.Appendf(nil, "%d %s", i, strings.Repeat("x", r.IntN(50)))
		if r.IntN(10) == 0 {
			line = nil
		}
		a := agent.Record{Offset: offset, Time: int64(i) * 1_000_000_007, Stderr: r.IntN(2) == 0, Partial: r.IntN(5) == 0, Line: line}
		all, lines = append(all, a), appendLine(lines, a)
		offset += agent.RecordSize(len(line))
	}
	return all, lines
}

// logs is all that was written, in order.
func logs(t *testing.T, path string) []byte {
	t.Helper()
	names, err := filepath.Glob(path + ".*")
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	var all []byte
	for _, name := range append(names, path) {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if len(data) > 0 && data[len(data)-1] != '\n' {
			t.Errorf("%s ends in the middle of a line", name)
		}
		all = append(all, data...)
	}
	return all
}

// after are the records from an offset on.
func after(all []agent.Record, offset uint64) []agent.Record {
	i := slices.IndexFunc(all, func(r agent.Record) bool { return r.Offset >= offset })
	if i < 0 {
		return nil
	}
	return all[i:]
}

// TestLogExactlyOnce lets daemons die at every point of a write, while the log is rotated and not.
func TestLogExactlyOnce(t *testing.T) {
	for seed := range uint64(150) {
		r := rand.New(rand.NewPCG(seed, 1))
		path, note := filepath.Join(t.TempDir(), "0.log"), filepath.Join(t.TempDir(), "pos")
		all, want := someRecords(r, 60)
		rotations := 0
		rotate := func() {
			if _, err := os.Stat(path); err != nil {
				return // rotated, and no daemon has come back since
			}
			if err := os.Rename(path, fmt.Sprintf("%s.%03d", path, rotations)); err != nil {
				t.Fatal(err)
			}
			rotations++
		}
		for acked := uint64(0); ; {
			w, err := newLogWriter(path, note)
			if err != nil {
				t.Fatal(err)
			}
			if w.offset() < acked {
				t.Fatalf("seed %d: %d is asked for, %d was acknowledged", seed, w.offset(), acked)
			}
			acked = liveAndDie(t, r, w, note, all, rotate)
			if len(after(all, acked)) == 0 {
				break
			}
			if r.IntN(4) == 0 {
				rotate() // while no daemon runs
			}
		}
		w, err := newLogWriter(path, note)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.write(after(all, w.offset())); err != nil {
			t.Fatal(err)
		}
		w.close()
		if got := logs(t, path); !bytes.Equal(got, want) {
			t.Fatalf("seed %d:\n%s\nwant\n%s", seed, got, want)
		}
	}
}

// liveAndDie writes some batches, the last of which is cut at a random point, and returns what was
// acknowledged.
func liveAndDie(t *testing.T, r *rand.Rand, w *logWriter, note string, all []agent.Record, rotate func()) uint64 {
	t.Helper()
	defer w.close()
	for range r.IntN(3) {
		batch := after(all, w.offset())
		if _, err := w.write(batch[:min(len(batch), r.IntN(8))]); err != nil {
			t.Fatal(err)
		}
		if r.IntN(4) == 0 {
			rotate()
			if r.IntN(3) > 0 { // else it goes on with the old file, and the new one is found later
				if err := w.reopen(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if _, err := os.Stat(w.path); err != nil {
			return w.offset()
		}
	}
	before, err := os.ReadFile(note)
	if err != nil {
		t.Fatal(err)
	}
	acked, from := w.offset(), int64(w.position.Size)
	batch := after(all, acked)
	next, err := w.write(batch[:min(len(batch), r.IntN(8))])
	if err != nil {
		t.Fatal(err)
	}
	switch r.IntN(3) {
	case 0:
		return next
	case 1: // in the middle of the write
		size := int64(w.position.Size)
		if err := os.Truncate(w.path, from+r.Int64N(size-from+1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(note, before, 0o600); err != nil { // before the position was noted
		t.Fatal(err)
	}
	return acked
}

func TestLogWithoutFileResumes(t *testing.T) {
	note := filepath.Join(t.TempDir(), "pos")
	all, _ := someRecords(rand.New(rand.NewPCG(1, 1)), 10)
	for i := range all {
		w, err := newLogWriter("", note)
		if err != nil {
			t.Fatal(err)
		}
		if w.offset() != all[i].Offset {
			t.Fatalf("goes on at %d, want %d", w.offset(), all[i].Offset)
		}
		if _, err := w.write(all[i : i+1]); err != nil {
			t.Fatal(err)
		}
		if err := w.reopen(); err != nil {
			t.Fatal(err)
		}
		if err := w.close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestLogLinesOfHostileGuest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	w, err := newLogWriter(path, path+"-pos")
	if err != nil {
		t.Fatal(err)
	}
	bad := agent.Record{Time: -1 << 63, Line: []byte("a\n2026-01-01T00:00:00Z stdout F forged\n\n")}
	if _, err := w.write([]agent.Record{bad}); err != nil {
		t.Fatal(err)
	}
	if got := logs(t, path); bytes.Count(got, []byte("\n")) != 1 {
		t.Errorf("one record became %q", got)
	}
	if err := w.close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path + "-pos"); err != nil {
		t.Fatal(err)
	}
	if w, err = newLogWriter(path, path+"-pos"); err != nil {
		t.Fatal(err)
	}
	defer w.close()
	if w.offset() != 0 {
		t.Errorf("a new container's log in an old file begins at %d", w.offset())
	}
}

func TestLogFollowsNoLink(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "passwd")
	if err := os.WriteFile(target, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, filepath.Join(dir, "0.log")); err != nil {
		t.Fatal(err)
	}
	if _, err := newLogWriter(filepath.Join(dir, "0.log"), filepath.Join(dir, "pos")); err == nil {
		t.Error("the log went through a link")
	}
}

// TestLogFullDisk fills a small disk: what does not fit is written when there is room.
func TestLogFullDisk(t *testing.T) {
	dir := smallDisk(t, 64<<10)
	path, note := filepath.Join(dir, "0.log"), filepath.Join(dir, "pos")
	all, want := someRecords(rand.New(rand.NewPCG(1, 2)), 3000)
	w, err := newLogWriter(path, note)
	if err != nil {
		t.Fatal(err)
	}
	full, rotations := 0, 0
	var done []byte
	for len(done) < len(want) {
		batch := after(all, w.offset())
		if len(batch) > 0 {
			batch = batch[:min(len(batch), 70)]
		}
		_, err := w.write(batch)
		if err == nil && len(batch) > 0 {
			continue
		}
		if err != nil {
			full++
			if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "full") {
				t.Fatalf("a full disk is told as %v", err)
			}
		}
		if full%2 == 1 { // the daemon dies over it
			w.close()
			if w, err = newLogWriter(path, note); err != nil {
				t.Fatal(err)
			}
		}
		old := fmt.Sprintf("%s.%d", path, rotations)
		if err := os.Rename(path, old); err != nil {
			t.Fatal(err)
		}
		if err := w.reopen(); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(old)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(old); err != nil {
			t.Fatal(err)
		}
		rotations++
		done = append(done, data...)
	}
	w.close()
	if full < 2 || !bytes.Equal(done, want) {
		t.Errorf("got %d bytes, want %d; the disk was full %d times", len(done), len(want), full)
	}
}

// smallDisk is a tmpfs of its own, gone when the test ends.
func smallDisk(t *testing.T, size int) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestMain gives the package's tests a mount namespace of their own, so that no mount outlives them.
func TestMain(m *testing.M) {
	if os.Getenv("CAISSON_TEST_NAMESPACE") == "" {
		runtime.LockOSThread() // the end of the thread would be taken for that of the process
		os.Exit(inNamespace())
	}
	os.Exit(m.Run())
}

func inNamespace() int {
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.Env = append(os.Environ(), "CAISSON_TEST_NAMESPACE=1")
	c.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	if err := c.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "tests in a mount namespace:", err)
		return 1
	}
	return 0
}
