package state

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
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
		"field": `{"version":1,"record":{"Name":"a","Later":1}}`, "shape": `[]`,
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
