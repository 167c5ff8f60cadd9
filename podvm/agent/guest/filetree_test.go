package guest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
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

// TestPieces: a set that comes in pieces is seen when the last is there, and not before; what was
// begun and not ended harms nothing.
func TestPieces(t *testing.T) {
	f := newFileSets(t.TempDir())
	put := func(before int, more bool, list ...*agent.File) (string, error) {
		return f.put(t.Context(), &agent.Files{Name: "config", Before: uint32(before), More: more, Files: list})
	}
	must := func(dir string, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return dir
	}
	one, two, three := configMap("1", "one"), configMap("2", "two"), configMap("3", "three")
	must(put(0, true, one[:3]...))
	if _, err := f.put(t.Context(), files("config")); !errdefs.IsNotFound(err) {
		t.Errorf("half a set: got %v", err)
	}
	dir := must(put(3, false, one[3:]...))
	check := func(want string) {
		t.Helper()
		if b, err := os.ReadFile(filepath.Join(dir, "key")); string(b) != want {
			t.Errorf("got %q, %v, want %q", b, err, want)
		}
	}
	check("one")
	must(put(0, true, two...))
	check("one")
	for before, p := range map[int][]*agent.File{1: two[:1], len(two) + 1: two[:1]} { // gone with the first of them
		if _, err := put(before, false, p...); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("a piece after %d files: got %v", before, err)
		}
	}
	check("one")
	must(put(0, true, two[:1]...))
	must(put(0, true, three...)) // begun anew
	must(put(len(three), false, &agent.File{Path: "..v3/more", Mode: 0o600}))
	check("three")
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("it holds %v, %v, want ..data, ..v3 and key", entries, err)
	}
	must(put(0, true, &agent.File{Path: "big", Mode: 0o600, Content: make([]byte, agent.FilesSize)}))
	if _, err := put(1, true, &agent.File{Path: "small", Mode: 0o600, Content: []byte{1}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("more than there may be: got %v", err)
	}
	if _, err := f.put(t.Context(), &agent.Files{Name: "single", Single: true, More: true, Files: two[3:]}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a piece of a single file: got %v", err)
	}
}
