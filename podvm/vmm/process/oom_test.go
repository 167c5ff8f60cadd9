package process

import (
	"context"
	"os"
	"strconv"
	"testing"
)

// ownScore gives this process another oom_score_adj for the test.
func ownScore(t *testing.T, score int) {
	t.Helper()
	before, err := oomScore(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	set := func(score int) error {
		return os.WriteFile(oomScorePath(os.Getpid()), []byte(strconv.Itoa(score)), 0)
	}
	if err := set(score); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { set(before) })
}

// sleeper starts a process whose folder it returns.
func sleeper(t *testing.T) (*Process, string) {
	t.Helper()
	p, err := Start(Spec{Path: "/bin/sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Kill(context.Background()) })
	dir := t.TempDir()
	if err := p.Save(dir); err != nil {
		t.Fatal(err)
	}
	return p, dir
}

func wantScore(t *testing.T, p *Process, want int) {
	t.Helper()
	if got, err := oomScore(p.PID()); err != nil || got != want {
		t.Errorf("got %d, %v; want %d", got, err, want)
	}
}

// How the daemon is protected from a lack of memory is not how its VMMs are.
func TestOOMScoreIsNotInherited(t *testing.T) {
	ownScore(t, 100)
	p, _ := sleeper(t)
	wantScore(t, p, 0)
}

// TestSetOOMScore: it is set for the process that is meant, and never so that this one goes first.
func TestSetOOMScore(t *testing.T) {
	ownScore(t, 100)
	p, dir := sleeper(t)
	for _, step := range []struct{ set, want int }{{500, 500}, {1000, 1000}, {2000, 1000}, {101, 101}, {100, 101}, {-997, 101}} {
		if err := SetOOMScore(dir, step.set); err != nil {
			t.Fatal(err)
		}
		wantScore(t, p, step.want)
	}
	other, theirs := sleeper(t)
	if err := SameOOMScore(theirs, dir); err != nil {
		t.Fatal(err)
	}
	wantScore(t, other, 101)
	for _, dir := range []string{t.TempDir(), theirs} { // nothing was started; one that has ended
		if dir == theirs {
			if err := other.Kill(limit(t)); err != nil {
				t.Fatal(err)
			}
		}
		if err := SetOOMScore(dir, 500); err != nil {
			t.Errorf("no process: %v", err)
		}
		if err := SameOOMScore(dir, dir); err != nil {
			t.Errorf("no process: %v", err)
		}
	}
	if err := os.WriteFile(SavedPath(dir), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := SetOOMScore(dir, 500); err == nil {
		t.Error("what was saved can't be read")
	}
}

// TestSetOOMScoreOfAnother: a process that came to the number later is left alone.
func TestSetOOMScoreOfAnother(t *testing.T) {
	p, dir := sleeper(t)
	before, err := oomScore(p.PID())
	if err != nil {
		t.Fatal(err)
	}
	another := &Process{identity: p.Identity()}
	another.identity.Start++
	if err := another.Save(dir); err != nil {
		t.Fatal(err)
	}
	if err := SetOOMScore(dir, 500); err != nil {
		t.Error(err)
	}
	wantScore(t, p, before)
}
