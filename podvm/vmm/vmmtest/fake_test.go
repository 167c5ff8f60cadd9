package vmmtest

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/caisson-vm/caisson/podvm/vmm"
)

// TestFakeKeepsTheHostsSide: what the suite asks of a driver whatever its guests do.
func TestFakeKeepsTheHostsSide(t *testing.T) {
	f := &Fake{Serve: func(_ *FakeVM, c net.Conn) { c.Close() }}
	c := vmm.Config{ID: "fake", Dir: t.TempDir(), Size: startSize, Max: maxSize}
	v, err := f.Launch(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := v.AddDisk(t.Context(), vmm.Disk{Serial: "disk", Path: path}); err != nil {
		t.Fatal(err)
	}
	refusals(t, v, "disk", path)
	if again, err := f.Attach(t.Context(), c); err != nil || again != v {
		t.Fatalf("attach: got %v, %v", again, err)
	}
	if err := v.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	gone(t, f, c, v, "disk", path, "killed")
}
