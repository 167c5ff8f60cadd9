package state

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

type sample struct{ Name string }

func TestRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pod.json")
	if err := Write(path, sample{"a"}); err != nil {
		t.Fatal(err)
	}
	var got sample
	if err := Read(path, &got); err != nil || got.Name != "a" {
		t.Fatalf("%+v, %v", got, err)
	}
}

func TestWhatIsNotUnderstood(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"empty": "", "cut": `{"version":1,"rec`, "future": `{"version":2,"record":{}}`,
		"type": `{"version":1,"record":{"Name":1}}`, "shape": `[]`, "none in it": `{"version":1}`, "more": `{"version":1,"record":{}}}`,
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var got sample
		if err := Read(path, &got); !errors.Is(err, errdefs.ErrDataLoss) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := Read(filepath.Join(dir, "none"), &sample{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
}

// TestNewerFields: a daemon that was rolled back reads what a newer one wrote, and what is the same in all
// versions also of a record that it must not read.
func TestNewerFields(t *testing.T) {
	for name, c := range map[string]struct {
		text       string
		read, part bool
	}{
		"field":    {`{"version":1,"record":{"Name":"a","Later":{"Deep":[1]}}}`, true, true},
		"envelope": {`{"version":1,"written":"2030","record":{"Name":"a"}}`, true, true},
		"version":  {`{"version":2,"record":{"Name":"a","Later":1}}`, false, true},
		"damaged":  {`{"version":1,"record":{"Name":"a",`, false, false},
	} {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		var whole, part sample
		if err := Read(path, &whole); (err == nil) != c.read || c.read && whole.Name != "a" || !c.read && !errors.Is(err, errdefs.ErrDataLoss) {
			t.Errorf("%s: %+v, %v", name, whole, err)
		}
		if err := ReadPart(path, &part); (err == nil) != c.part || c.part && part.Name != "a" {
			t.Errorf("part of %s: %+v, %v", name, part, err)
		}
	}
}

func TestSecondDaemonIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "root")
	l, err := Acquire(dir, "root")
	if err != nil {
		t.Fatal(err)
	}
	_, err = Acquire(dir, "state")
	if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "key state") {
		t.Fatalf("got %v", err)
	}
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	if l, err = Acquire(dir, "root"); err != nil {
		t.Fatal(err)
	}
	l.Release()
}

// TestLockOnFullDisk: a daemon starts where there is no block left, and the lock says whose it is.
func TestLockOnFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("needs root for a file system of its own:", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	first, err := Acquire(dir, "root")
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Release(); err != nil {
		t.Fatal(err)
	}
	fill := func() {
		f, err := os.OpenFile(filepath.Join(dir, "full"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for err == nil {
			_, err = f.Write(make([]byte, 4096))
		}
	}
	fill()
	for _, without := range []bool{false, true} {
		if without { // the file is there, and had no block when the disk became full
			if err := os.Truncate(filepath.Join(dir, "lock"), 0); err != nil {
				t.Fatal(err)
			}
			fill()
		}
		l, err := Acquire(dir, "root")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Acquire(dir, "root"); !errors.Is(err, errdefs.ErrFailedPrecondition) {
			t.Errorf("a second one: %v", err)
		} else if !without && !strings.Contains(err.Error(), fmt.Sprintf("process %d:", os.Getpid())) {
			t.Error(err)
		}
		if err := l.Release(); err != nil {
			t.Fatal(err)
		}
	}
}
