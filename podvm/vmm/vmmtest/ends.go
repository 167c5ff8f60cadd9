package vmmtest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/vmm"
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
	// Who still waits is told at once that there is nothing to wait for any more.
	dialled := make(chan error, 1)
	go func() {
		_, err := v.Dial(t.Context(), vmm.AgentPort)
		dialled <- err
	}()
	if err := v.Kill(limited(t, callLimit)); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-dialled:
		if !errors.Is(err, vmm.ErrGone) {
			t.Errorf("dial a VM that ends: got %v, want %v", err, vmm.ErrGone)
		}
	case <-time.After(endLimit):
		t.Error("dial has not noticed that the VM has ended")
	}
	gone(t, d, c, v, imageSerial, s.image, "killed")
	processGone(t, pid)
}

// noKernel has a VM that can't start.
func (s *suite) noKernel(t *testing.T) {
	c, d := s.config(t, "no-kernel"), s.newDriver(t)
	c.Kernel = filepath.Join(s.dir, "no-kernel")
	refused(t, d, c)
}

// refused sees that a launch fails and leaves nothing in the VM's folder but logs.
func refused(t *testing.T, d vmm.Driver, c vmm.Config) {
	t.Helper()
	v, err := d.Launch(limited(t, callLimit), c)
	if err == nil {
		t.Error("it was launched")
		if err := v.Kill(context.Background()); err != nil {
			t.Error(err)
		}
		return
	}
	t.Log(err)
	if errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("it hung: %v", err)
	}
	onlyLogs(t, c)
}
