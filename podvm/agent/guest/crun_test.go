package guest

import (
	"errors"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSeal: crun takes a program for sealed that has exactly these four, and then does not copy itself.
func TestSeal(t *testing.T) {
	program, err := exec.LookPath("true")
	if err != nil {
		t.Fatal(err)
	}
	s, err := seal(program)
	if err != nil {
		t.Fatal(err)
	}
	defer s.file.Close()
	const all = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if got, err := unix.FcntlInt(s.file.Fd(), unix.F_GET_SEALS, 0); err != nil || got != all {
		t.Errorf("sealed with %#x: %v", got, err)
	}
	if err := os.WriteFile(s.path(), []byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("it can be written to: %v", err)
	}
	if err := exec.Command(s.path()).Run(); err != nil {
		t.Errorf("run it: %v", err)
	}
	if _, err := seal(t.TempDir() + "/none"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
}
