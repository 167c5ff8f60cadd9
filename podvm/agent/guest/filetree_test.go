package guest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/caisson-vm/caisson/podvm/agent"
	"golang.org/x/sys/unix"
)

// What a container put in a file's place, after it was looked at, is neither waited for nor believed.
func TestHoldsOnlyItsContent(t *testing.T) {
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for name, make := range map[string]func(string) error{
		"same":   func(p string) error { return os.WriteFile(p, []byte("content"), 0o644) },
		"longer": func(p string) error { return os.WriteFile(p, []byte("content, and more"), 0o644) },
		"huge": func(p string) error {
			if err := os.WriteFile(p, []byte("content"), 0o644); err != nil {
				return err
			}
			return os.Truncate(p, 1<<40)
		},
		"pipe": func(p string) error { return unix.Mkfifo(p, 0o644) },
		"gone": func(string) error { return nil },
		"link": func(p string) error { return os.Symlink("/etc/passwd", p) },
	} {
		if err := make(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		f := &agent.File{Path: name, Content: []byte("content")}
		if got := (tree{root: root}).holds(f); got != (name == "same") {
			t.Errorf("%s: %v", name, got)
		}
	}
}
