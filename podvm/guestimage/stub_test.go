package guestimage

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestStub has the dynamic linker load crun with a library of the same names in systemd's place.
func TestStub(t *testing.T) {
	crun, err := exec.LookPath("crun")
	if err != nil {
		t.Fatalf("%v: run 'apt-get install crun' first", err)
	}
	program, err := os.ReadFile(crun)
	if err != nil {
		t.Fatal(err)
	}
	library, err := stub(program, systemd)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, systemd), library, 0o755); err != nil {
		t.Fatal(err)
	}
	run := func(env ...string) string {
		t.Helper()
		cmd := exec.Command(crun, "--root", dir, "--version")
		cmd.Env = append(env, "LD_LIBRARY_PATH="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	loaded := run("LD_TRACE_LOADED_OBJECTS=1")
	if !strings.Contains(loaded, dir+"/"+systemd) || strings.Contains(loaded, "libgcrypt") {
		t.Errorf("the dynamic linker loads\n%s", loaded)
	}
	if out := run("LD_BIND_NOW=1"); !strings.HasPrefix(out, "crun version") || strings.Contains(out, systemd) {
		t.Errorf("crun says %q", out)
	}
	if _, err := stub(program, "libnone.so.1"); err == nil {
		t.Error("a library that it does not import has a stub")
	}
}
