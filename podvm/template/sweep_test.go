package template

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func noClones(string) bool { return false }

func there(dir string) bool {
	_, err := os.Stat(dir)
	return err == nil
}

// TestUnusedGoesWhileTheDaemonRuns: those of namespaces, when nobody uses them and no clone runs.
func TestUnusedGoesWhileTheDaemonRuns(t *testing.T) {
	o := options(t, &driver{})
	synctest.Test(t, func(t *testing.T) {
		s := store(t, o)
		defer s.Close()
		node, old, asked, cloned := get(t, s, ""), get(t, s, "old"), get(t, s, "asked"), get(t, s, "cloned")
		s.Sweep(func(dir string) bool { return dir == cloned })
		time.Sleep(unusedMax - sweepPause)
		get(t, s, "asked")
		if !there(old) {
			t.Error("one went before its day was over")
		}
		time.Sleep(2*sweepPause + time.Minute)
		synctest.Wait()
		for dir, want := range map[string]bool{node: true, old: false, asked: true, cloned: true} {
			if there(dir) != want {
				t.Errorf("%s is there: %v, want %v", filepath.Base(dir), !want, want)
			}
		}
		if left, _ := filepath.Glob(filepath.Join(o.Dir, "*")); len(left) != 3 {
			t.Errorf("left are %q", left)
		}
		if n, _ := s.Usage(); n != 3 {
			t.Errorf("usage says %d", n)
		}
		if get(t, s, "old") != old || !there(old) {
			t.Error("it is not made anew")
		}
	})
}

// TestSweepLeavesWhatIsWanted: one that is checked or made again, and one that was asked for meanwhile.
func TestSweepLeavesWhatIsWanted(t *testing.T) {
	o := options(t, &driver{})
	s := store(t, o)
	dir := get(t, s, "tenant")
	age := func() {
		t.Helper()
		long := time.Now().Add(-unusedMax - time.Hour)
		if err := os.Chtimes(usedPath(dir), long, long); err != nil {
			t.Fatal(err)
		}
	}
	age()
	s.sweepUnused(func(string) bool { // a pod asks for it just then
		get(t, s, "tenant")
		return false
	})
	if !there(dir) {
		t.Fatal("one went that a pod had asked for")
	}
	age()
	s.mu.Lock()
	s.entries["tenant"] = &entry{ready: make(chan struct{}), dir: dir}
	s.mu.Unlock()
	s.sweepUnused(noClones)
	if !there(dir) {
		t.Fatal("one went that was being made")
	}
	s.mu.Lock()
	delete(s.entries, "tenant")
	s.mu.Unlock()
	s.sweepUnused(noClones)
	if there(dir) {
		t.Fatal("nobody wanted it")
	}
}

// TestSweepAndStarts: whatever comes first, who is given a template finds it.
func TestSweepAndStarts(t *testing.T) {
	s := store(t, options(t, &driver{}))
	dir := get(t, s, "tenant")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for range 50 {
		long := time.Now().Add(-unusedMax - time.Hour)
		if err := os.Chtimes(usedPath(dir), long, long); err != nil {
			t.Fatal(err)
		}
		var both sync.WaitGroup
		both.Go(func() { s.sweepUnused(noClones) })
		both.Go(func() {
			if dir, err := s.Template(ctx, "tenant"); err != nil || !there(usedPath(dir)) {
				t.Errorf("template %q: %v", dir, err)
			}
		})
		both.Wait()
		get(t, s, "tenant")
	}
}

// TestUsageIsTheFolders: also what a daemon before this one has made.
func TestUsageIsTheFolders(t *testing.T) {
	o := options(t, &driver{})
	dir := get(t, store(t, o), "tenant")
	s := store(t, o)
	if n, bytes := s.Usage(); n != 1 || bytes == 0 {
		t.Errorf("usage %d, %d bytes", n, bytes)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if n, bytes := s.Usage(); n != 0 || bytes != 0 {
		t.Errorf("usage of none %d, %d bytes", n, bytes)
	}
}
