package main

import (
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCheckDisk(t *testing.T) {
	for size, c := range map[string]struct {
		says string
		warn bool
	}{"3g": {"tmpfs", true}, "1g": {"make it 2 GiB", false}} {
		dir := t.TempDir()
		if err := unix.Mount("root", dir, "tmpfs", 0, "size="+size); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		f := checkDisk(t.Context(), Config{Root: filepath.Join(dir, "not", "yet")})
		if f.err == nil || f.warn != c.warn || !strings.Contains(f.err.Error(), c.says) {
			t.Errorf("%s in memory: %+v", size, f)
		}
	}
}
