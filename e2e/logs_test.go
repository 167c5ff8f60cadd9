package e2e

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func testLogs(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod()
	t.Run("both streams in order", func(t *testing.T) {
		c := pod.Run(images.Busybox, harness.Shell("for i in 1 2 3; do echo out $i; echo err $i >&2; done"))
		c.Wait()
		if out := c.Output("stdout"); out != "out 1\nout 2\nout 3\n" {
			t.Errorf("stdout: got %q", out)
		}
		if out := c.Output("stderr"); out != "err 1\nerr 2\nerr 3\n" {
			t.Errorf("stderr: got %q", out)
		}
	})
	t.Run("long lines in parts", func(t *testing.T) {
		const length = 100_000
		c := pod.Run(images.Busybox, harness.Shell(fmt.Sprintf("yes x | tr -d '\\n' | head -c %d; echo; echo short", length)))
		c.Wait()
		lines, err := harness.ReadLog(c.LogFile())
		if err != nil {
			t.Fatal(err)
		}
		if len(lines) < 3 || !lines[0].Partial || lines[len(lines)-2].Partial || lines[len(lines)-1].Text != "short" {
			t.Errorf("got %d records", len(lines))
		}
		for _, l := range lines {
			if len(l.Text) > 16<<10 {
				t.Errorf("a record of %d bytes", len(l.Text))
			}
		}
		if want := strings.Repeat("x", length) + "\nshort\n"; c.Output("stdout") != want {
			t.Error("the parts are not what was written")
		}
	})
	t.Run("no newline at the end", func(t *testing.T) {
		c := pod.Run(images.Busybox, harness.Shell("printf 'no end'"))
		c.Wait()
		lines, err := harness.ReadLog(c.LogFile())
		if err != nil || len(lines) != 1 || lines[0].Text != "no end" {
			t.Errorf("got %v, %v", lines, err)
		}
	})
	t.Run("a lot of it", func(t *testing.T) {
		const count = 200_000
		c := pod.Run(images.Busybox, harness.Shell(fmt.Sprintf("seq %d", count)))
		c.Wait()
		numbered(t, c.Output("stdout"), count)
	})
	t.Run("terminal", func(t *testing.T) {
		c := pod.Run(images.Busybox, harness.Shell("echo out; echo err >&2; tty"), func(c *runtimeapi.ContainerConfig) { c.Tty = true })
		c.Wait()
		has(t, c.Output("stdout"), "out\r\n", "err\r\n", "/dev/")
	})
	t.Run("rotation", func(t *testing.T) { testRotation(t, d, pod) })
}

// numbered fails the test unless the text is the numbers from 1 to count, each once and in order.
func numbered(t *testing.T, text string, count int) {
	t.Helper()
	lines := strings.Fields(text)
	for i, l := range lines {
		if l != fmt.Sprint(i+1) {
			t.Errorf("line %d is %q: lines were lost or doubled", i+1, l)
			return
		}
	}
	if len(lines) != count {
		t.Errorf("got %d lines, want %d", len(lines), count)
	}
}

// testRotation does as the kubelet: rename, reopen, with the container writing on.
func testRotation(t *testing.T, d *harness.Daemon, pod *harness.Pod) {
	c := pod.Run(images.Busybox, harness.Shell("i=0; while [ ! -e /stop ]; do i=$((i+1)); echo $i; done"))
	old := c.LogFile() + ".1"
	some := func(file string) func() error {
		return func() error {
			if info, err := os.Stat(file); err != nil || info.Size() < 1000 {
				return errors.Join(err, errors.New("little in it"))
			}
			return nil
		}
	}
	harness.Eventually(t, "the log grows", some(c.LogFile()))
	if err := os.Rename(c.LogFile(), old); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Runtime().ReopenContainerLog(t.Context(), &runtimeapi.ReopenContainerLogRequest{ContainerId: c.ID}); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, "the new log grows", some(c.LogFile()))
	if _, err := c.TryExec(30, "touch", "/stop"); err != nil { // its exit code: it may be killed with the container
		t.Fatal(err)
	}
	c.Wait()
	fresh := c.Output("stdout")
	if err := os.Rename(old, c.LogFile()); err != nil {
		t.Fatal(err)
	}
	text := c.Output("stdout") + fresh
	numbered(t, text, len(strings.Fields(text)))
}
