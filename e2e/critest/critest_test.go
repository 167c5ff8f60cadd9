package critest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/e2e/harness"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { harness.Main(m) }

// limit is for all of critest, with every pod's VM emulated.
const limit = 60 * time.Minute

// TestCritest runs the suite. CAISSON_CRITEST_FOCUS restricts it to specs that match a regular
// expression; then nothing is compared or written.
func TestCritest(t *testing.T) {
	known, err := ReadKnown()
	if err != nil {
		t.Fatal(err)
	}
	d := harness.Start(t)
	focus := os.Getenv("CAISSON_CRITEST_FOCUS")
	specs := run(t, d, focus)
	if focus != "" {
		for _, s := range specs {
			t.Logf("%s: %s", s.Outcome, key(s.Group, s.Name))
			if s.Outcome == Fails {
				t.Error(s.Message)
			}
		}
		return
	}
	for _, wrong := range known.Compare(specs) {
		t.Error(wrong)
	}
	file := filepath.Join(harness.Top(), "docs", "CONFORMANCE.md")
	if err := os.WriteFile(file, []byte(Conformance(specs, known, versions(t))), 0o644); err != nil {
		t.Error(err)
	}
}

// run runs critest, two specs at a time, and returns what became of each.
func run(t *testing.T, d *harness.Daemon, focus string) []Spec {
	t.Helper()
	tmp := t.TempDir()
	t.Cleanup(func() { tidy(t, tmp) })
	report, log := filepath.Join(tmp, "report.json"), filepath.Join(tmp, "log")
	endpoint := "unix://" + d.Config.Listen
	args := []string{
		"-config", os.DevNull, "-runtime-endpoint", endpoint, "-image-endpoint", endpoint,
		"-parallel", "2", "-ginkgo.no-color", "-ginkgo.json-report", report,
	}
	if focus != "" {
		args = append(args, "-ginkgo.focus", focus)
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, harness.Tool("critest"), args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "PATH="+filepath.Dir(harness.Tool("ginkgo"))+":"+os.Getenv("PATH"))
	out, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	progress := &counter{out: out}
	cmd.Stdout, cmd.Stderr = progress, progress
	// Ginkgo has the specs run in processes of its own: the whole group ends when time is up.
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGTERM) }
	cmd.WaitDelay = time.Minute
	err = cmd.Run()
	specs, bad := ReadReport(report)
	if bad != nil {
		text, _ := os.ReadFile(log)
		t.Fatalf("critest: %v\n%s", errors.Join(err, bad), text[max(0, len(text)-8000):])
	}
	return specs
}

// counter passes output on to a file, and tells now and then how many specs have ended.
type counter struct {
	out  io.Writer
	done int
	said time.Time
}

func (c *counter) Write(p []byte) (int, error) {
	c.done += bytes.Count(p, []byte("\n• ")) + bytes.Count(p, []byte("\n• [FAILED]"))
	if time.Since(c.said) > 30*time.Second {
		c.said = time.Now()
		fmt.Printf("critest: %d specs so far\n", c.done)
	}
	return c.out.Write(p)
}

// tidy undoes what critest itself leaves when a spec fails: mounts below its temporary folder,
// and, always, shared memory segments.
func tidy(t *testing.T, tmp string) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Error(err)
	}
	for l := range strings.Lines(string(mounts)) {
		if at := strings.Fields(l)[1]; strings.HasPrefix(at, tmp) {
			_ = unix.Unmount(at, unix.MNT_DETACH)
		}
	}
	if err := exec.Command("ipcrm", "--all=shm").Run(); err != nil {
		t.Errorf("remove critest's shared memory segments: %v", err)
	}
}

// versions names what was run.
func versions(t *testing.T) string {
	t.Helper()
	out, err := exec.Command(harness.Tool("critest"), "-version").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	_, version, _ := strings.Cut(string(out), "critest version: ")
	version, _, _ = strings.Cut(version, "\n")
	return "critest " + version
}
