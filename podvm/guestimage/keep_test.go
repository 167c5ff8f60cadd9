package guestimage

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// made publishes an image whose kernel is this text.
func made(t *testing.T, dir, kernel string) Files {
	t.Helper()
	b := builder{tree: make(tree), kernel: []byte(kernel), manifest: Manifest{Format: manifestFormat, Cmdline: kernel}}
	f, err := b.publish(dir)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// isKept tells whether what Keep returned is the image, whatever became of its folder.
func isKept(t *testing.T, kept, want Files, kernel string) {
	t.Helper()
	if kept.Version != want.Version || kept.Cmdline != kernel {
		t.Errorf("kept %+v, want %+v", kept, want)
	}
	if data, err := os.ReadFile(kept.Kernel); err != nil || string(data) != kernel {
		t.Errorf("the kernel is %q, %v", data, err)
	}
	if err := Verify(kept.Dir); err != nil {
		t.Error(err)
	}
}

// TestKeep builds another guest under a daemon that runs: what it boots stays what its templates are named by.
func TestKeep(t *testing.T) {
	root := t.TempDir()
	dir, folder := filepath.Join(root, "guest"), filepath.Join(root, "daemon", "guest")
	if _, err := Keep(dir, folder); !errors.Is(err, errdefs.ErrNotFound) || !strings.Contains(err.Error(), dir) {
		t.Errorf("without a guest: %v", err)
	}
	first := made(t, dir, "first")
	kept, err := Keep(dir, folder)
	if err != nil {
		t.Fatal(err)
	}
	second := made(t, dir, "second")
	isKept(t, kept, first, "first")
	if kept, err = Keep(dir, folder); err != nil { // by the next daemon
		t.Fatal(err)
	}
	isKept(t, kept, second, "second")
	if _, err := Keep(folder, folder); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("a folder in itself: %v", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	isKept(t, kept, second, "second")
}

// TestKeepElsewhere has the daemon's folder on another file system, with space and without.
func TestKeepElsewhere(t *testing.T) {
	dir, other := filepath.Join(t.TempDir(), "guest"), t.TempDir()
	if err := unix.Mount("tmpfs", other, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("needs root for a file system of its own:", err)
	}
	t.Cleanup(func() { unix.Unmount(other, unix.MNT_DETACH) })
	folder := filepath.Join(other, "guest")
	first := made(t, dir, "first")
	kept, err := Keep(dir, folder)
	if err != nil || kept.Dir != folder {
		t.Fatalf("%+v, %v", kept, err)
	}
	isKept(t, kept, first, "first")
	large := strings.Repeat("x", 1<<20)
	there := made(t, dir, large)
	if kept, err = Keep(dir, folder); err != nil || kept != there {
		t.Errorf("on a full disk: %v", err)
	}
	if _, err := os.Stat(folder); !os.IsNotExist(err) {
		t.Errorf("half of it is left: %v", err)
	}
}
