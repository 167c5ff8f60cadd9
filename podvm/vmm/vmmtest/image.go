package vmmtest

import (
	"archive/tar"
	"bytes"
	"os"
	"path"
	"path/filepath"
	"slices"
	"testing"

	"github.com/caisson-vm/caisson/imagestore/erofs"
	"github.com/caisson-vm/caisson/podvm/guestimage"
)

// GuestVar names the folder of the guest that is tested with.
const GuestVar = "CAISSON_TEST_GUEST"

// Guest finds the guest to test with: where GuestVar says, else in build/guest of the module.
func Guest(t *testing.T) guestimage.Files {
	t.Helper()
	dir := os.Getenv(GuestVar)
	if dir == "" {
		dir = filepath.Join(moduleRoot(t), "build", "guest")
	}
	g, err := guestimage.Open(dir)
	if err != nil {
		t.Fatalf("run make guest first, or name the folder of a guest in %s: %v", GuestVar, err)
	}
	return g
}

// moduleRoot is the folder above with go.mod in it.
func moduleRoot(t *testing.T) string {
	t.Helper()
	start, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == "/" {
			t.Fatalf("no go.mod above %s: name the folder of a guest in %s", start, GuestVar)
		}
	}
}

// makeImage writes an image that holds the test program.
func makeImage(t *testing.T, image string) {
	t.Helper()
	files, err := program()
	if err != nil {
		t.Fatal(err)
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	add := func(h tar.Header, data []byte) {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	dirs := []string{"/proc", "/sys", "/dev", "/etc", "/lib", "/lib64"}
	for name, source := range files {
		data, err := os.ReadFile(source)
		if err != nil {
			t.Fatal(err)
		}
		if dir := path.Dir(name); dir != "/" && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
		add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Size: int64(len(data))}, data)
	}
	for _, dir := range dirs {
		add(tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755}, nil)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	e := erofs.NewWriter(f, [16]byte{1}, erofs.Limits{})
	l, err := e.Read(t.Context(), &layer)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Apply(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Finish(); err != nil {
		t.Fatal(err)
	}
}
