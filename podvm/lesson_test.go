package podvm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestLesson: the image is one that the kernel mounts, with what a container's file systems are mounted on, and
// its program runs until a signal ends it.
func TestLesson(t *testing.T) {
	image, dir := filepath.Join(t.TempDir(), "lesson.erofs"), t.TempDir()
	if err := writeLesson(t.Context(), image); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", image, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	for _, name := range []string{"dev", "proc", "sys"} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || !st.IsDir() {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := exec.Command(filepath.Join(dir, waiter))
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	for { // until the kernel shows it in pause(2)
		call, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", c.Process.Pid))
		if err != nil {
			t.Fatalf("it ended: %v", errors.Join(err, c.Wait()))
		}
		if strings.HasPrefix(string(call), "34 ") {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err := c.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(); err == nil || c.ProcessState.String() != "signal: interrupt" {
		t.Errorf("it ended by %v, want the signal", err)
	}
}
