package process

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

func limit(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestKillWaitsForTheEnd(t *testing.T) {
	p, err := Start(Spec{Path: "/bin/sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := p.Kill(limit(t)); err != nil {
			t.Fatal(err)
		}
	}
	var exit *exec.ExitError
	if !errors.As(p.Err(), &exit) || !strings.Contains(exit.Error(), "killed") {
		t.Fatalf("status %v, want killed", p.Err())
	}
}

func TestFoundProcessIsWatched(t *testing.T) {
	p, err := Start(Spec{Path: "/bin/sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	found, err := Find(p.Identity())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(limit(t)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-found.Done():
	case <-limit(t).Done():
		t.Fatal("its end was not seen")
	}
	if _, err := Find(p.Identity()); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("found an ended process: %v", err)
	}
}

func TestAnotherProcessIsNotFound(t *testing.T) {
	p, err := open(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer p.pidfd.Close()
	id := p.Identity()
	id.Start++
	if _, err := Find(id); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("took a process with another start time: %v", err)
	}
}

// What another daemon started is ended by what it saved.
func TestKillIn(t *testing.T) {
	dir := t.TempDir()
	if err := KillIn(limit(t), dir); err != nil {
		t.Errorf("where nothing was saved: %v", err)
	}
	p, err := Start(Spec{Path: "/bin/sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill(context.Background())
	if err := p.Save(dir); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := KillIn(limit(t), dir); err != nil {
			t.Fatal(err)
		}
	}
	<-p.Done()
	if err := os.WriteFile(SavedPath(dir), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := KillIn(limit(t), dir); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("what was saved can't be read: %v", err)
	}
}

// TestKillInUnsaved: the daemon may be killed before it has noted what it started.
func TestKillInUnsaved(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	var all []*Process
	for _, d := range []string{dir, other} {
		p, err := Start(Spec{Path: "/bin/sleep", Args: []string{"1000"}, Dir: d})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Kill(context.Background())
		all = append(all, p)
	}
	if err := KillIn(limit(t), dir+"/"); err != nil {
		t.Fatal(err)
	}
	<-all[0].Done()
	if _, err := Find(all[1].Identity()); err != nil {
		t.Errorf("the process of another folder: %v", err)
	}
}

func TestNothingIsInherited(t *testing.T) {
	leak, err := os.Open("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	defer leak.Close()
	out, err := os.CreateTemp(t.TempDir(), "log")
	if err != nil {
		t.Fatal(err)
	}
	p, err := Start(Spec{Path: "/bin/sh", Args: []string{"-c", "ls -l /proc/$$/fd"}, Log: out, Files: []*os.File{leak}})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Err(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(text), "->"); n != 4 { // 0, 1, 2 and the given one
		t.Fatalf("%d descriptors:\n%s", n, text)
	}
	if strings.Count(string(text), "/etc/passwd") != 1 {
		t.Fatalf("want the given file once:\n%s", text)
	}
}

func TestStartErrorsNameTheProgram(t *testing.T) {
	if _, err := Start(Spec{Path: "/nonexistent/vmm"}); err == nil || !strings.Contains(err.Error(), "/nonexistent/vmm") {
		t.Fatalf("got %v", err)
	}
	if _, err := Start(Spec{Path: "/bin/true", Cgroup: "/nonexistent"}); err == nil || !strings.Contains(err.Error(), "cgroup") {
		t.Fatalf("got %v", err)
	}
}
