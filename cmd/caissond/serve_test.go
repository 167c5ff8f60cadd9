package main

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// Each daemon removes from its root and its state what it does not know: another's pods.
func TestFoldersAreOfOneDaemon(t *testing.T) {
	dir := t.TempDir()
	config := func(root, state string) Config {
		return Config{Root: filepath.Join(dir, root), State: filepath.Join(dir, state)}
	}
	release, err := lockFolders(config("a", "run"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ root, state, says string }{
		{"a", "run", "key root"}, {"a", "other", "key root"}, {"b", "run", "key state"}, {"run", "b", "key root"},
	} {
		if _, err := lockFolders(config(c.root, c.state)); !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("root %s, state %s: %v", c.root, c.state, err)
		}
	}
	release()
	for _, c := range []Config{config("b", "run"), config("one", "one")} { // what failed holds nothing
		release, err := lockFolders(c)
		if err != nil {
			t.Fatal(err)
		}
		release()
	}
}
