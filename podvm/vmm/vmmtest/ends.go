package vmmtest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// noAnswer has a guest that never answers: its VMM is stopped while it boots.
func (s *suite) noAnswer(t *testing.T) {
	c, d := s.config(t, "silent"), s.newDriver(t)
	c.Cmdline += " ignore_loglevel"
	v := launch(t, d, c)
	eventually(t, "the guest's kernel speaks", func() error {
		if text, err := os.ReadFile(filepath.Join(c.Dir, "console.log")); err != nil || len(text) == 0 {
			return errors.Join(errors.New("the console is empty"), err)
		}
		return nil
	})
	pid := v.Info().PID
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := impatient(t, v, s.image); err == nil || !strings.Contains(err.Error(), "has not come up") || !strings.Contains(err.Error(), "console ends") {
		t.Errorf("dial: got %v, want it to say that the guest has not come up, and its console's end", err)
	}
	if err := v.Kill(limited(t, callLimit)); err != nil {
		t.Fatal(err)
	}
	gone(t, d, c, v, imageSerial, s.image, "killed")
	processGone(t, pid)
}

// noKernel has a VM that can't start.
func (s *suite) noKernel(t *testing.T) {
	c, d := s.config(t, "no-kernel"), s.newDriver(t)
	c.Kernel = filepath.Join(s.dir, "no-kernel")
	refused(t, s, func(ctx context.Context) error { _, err := d.Launch(ctx, c); return err }, c.Dir)
}

// refused sees that a launch fails and leaves nothing in the VM's folder but logs.
func refused(t *testing.T, s *suite, launch func(context.Context) error, dir string) {
	t.Helper()
	err := launch(limited(t, callLimit))
	if err == nil {
		t.Error("it was launched")
		return
	}
	t.Log(err)
	if errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("it hung: %v", err)
	}
	left, _ := filepath.Glob(filepath.Join(dir, "*"))
	for _, file := range left {
		if !strings.HasSuffix(file, ".log") {
			t.Errorf("left behind: %s", file)
		}
	}
}
