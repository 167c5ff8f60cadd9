package guestimage

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// fake makes an image in a folder.
func fake(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "guest")
	b := builder{kernel: []byte("kernel"), tree: make(tree), manifest: Manifest{Format: manifestFormat, Cmdline: "quiet"}}
	b.tree.file("init", 0o755, []byte("agent"))
	if _, err := b.publish(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestOpenFindsWhatWasPublished(t *testing.T) {
	dir := fake(t)
	files, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(files.Version) != 16 || files.Cmdline != "quiet" || files.Kernel != filepath.Join(dir, "vmlinux") {
		t.Errorf("got %+v", files)
	}
	if err := Verify(dir); err != nil {
		t.Error(err)
	}
	again, err := Open(fake(t))
	if err != nil || again.Version != files.Version {
		t.Errorf("the same content has the versions %s and %s, %v", files.Version, again.Version, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	write := func(name, content string) func(string) error {
		return func(dir string) error { return os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644) }
	}
	for name, c := range map[string]struct {
		harm func(dir string) error
		kind error
	}{
		"nothing there":       {os.RemoveAll, errdefs.ErrNotFound},
		"a file is missing":   {func(dir string) error { return os.Remove(filepath.Join(dir, "initrd")) }, errdefs.ErrFailedPrecondition},
		"a file is cut short": {write("vmlinux", "kern"), errdefs.ErrFailedPrecondition},
		"damaged manifest":    {write("manifest.json", "{"), errdefs.ErrFailedPrecondition},
		"empty manifest":      {write("manifest.json", `{"format":1}`), errdefs.ErrFailedPrecondition},
		"of the future":       {write("manifest.json", `{"format":99}`), errdefs.ErrFailedPrecondition},
	} {
		dir := fake(t)
		if err := c.harm(dir); err != nil {
			t.Fatal(err)
		}
		_, err := Open(dir)
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), "guest build") {
			t.Errorf("%s: got %v, want %v and what to do", name, err, c.kind)
		}
	}
}

func TestVerifySeesChangedBytes(t *testing.T) {
	dir := fake(t)
	if err := os.WriteFile(filepath.Join(dir, "vmlinux"), []byte("kermel"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err != nil {
		t.Fatal(err)
	}
	if err := Verify(dir); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("got %v", err)
	}
}

func TestManifestSurvivesARoundTrip(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(fake(t), manifestName))
	if err != nil {
		t.Fatal(err)
	}
	var m Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	again, err := json.MarshalIndent(m, "", "  ")
	if err != nil || string(again)+"\n" != string(data) {
		t.Errorf("%s became %s, %v", data, again, err)
	}
}

func TestBuildKeepsForeignFolders(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "precious"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := Build(t.Context(), BuildOptions{Output: dir, Agent: "/nonexistent"})
	if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "precious") {
		t.Errorf("got %v", err)
	}
}
