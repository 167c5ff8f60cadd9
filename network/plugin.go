package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"
)

const (
	maxStdout = 4 << 20 // bytes of a plugin's result
	maxStderr = 4 << 10 // bytes of its last words that an error carries
)

// runner runs plugins for libcni, each in a process group of its own with a deadline.
type runner struct {
	version.PluginDecoder
	limit time.Duration
	// hold, where set, is inherited by the plugins, which outlive the daemon then. Those without one
	// die with it.
	hold *os.File
}

var _ invoke.Exec = (*runner)(nil)

// FindInPath returns the path of a plugin.
func (r *runner) FindInPath(plugin string, dirs []string) (string, error) {
	path, err := invoke.FindInPath(plugin, dirs)
	if err != nil {
		return "", missingPlugin(plugin, dirs)
	}
	return path, nil
}

// ExecPlugin runs the plugin and returns what it wrote to stdout. One that outlives the deadline
// or ctx is killed with its children.
func (r *runner) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, r.limit,
		fmt.Errorf("no answer within %v: %w", r.limit, context.DeadlineExceeded))
	defer cancel()
	for {
		stdout, err := r.run(ctx, path, stdin, env)
		// A plugin that is being replaced by an upgrade.
		if !errors.Is(err, unix.ETXTBSY) {
			return stdout, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (r *runner) run(ctx context.Context, path string, stdin []byte, env []string) ([]byte, error) {
	stdout, stderr := &head{limit: maxStdout}, &tail{limit: maxStderr}
	cmd := exec.CommandContext(ctx, path)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = env, bytes.NewReader(stdin), stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if r.hold != nil {
		cmd.ExtraFiles = []*os.File{r.hold}
	} else {
		// Pdeathsig means the death of the thread that forks, so the thread must not end before.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
	}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	// ErrWaitDelay: it succeeded but left a child behind that holds stdout.
	if err == nil || errors.Is(err, exec.ErrWaitDelay) {
		return stdout.buf, nil
	}
	if errors.Is(err, unix.ETXTBSY) {
		return nil, err
	}
	return nil, pluginError(ctx, path, env, err, stdout.buf, string(stderr.buf))
}

// pluginError says which plugin failed at what, in its own words as far as it had any.
func pluginError(ctx context.Context, path string, env []string, err error, stdout []byte, stderr string) error {
	what := fmt.Sprintf("plugin %s, %s", path, command(env))
	if ctx.Err() != nil {
		return fmt.Errorf("%s: killed, %w; see whether what it waits for (its daemon, the API server, a lock) is up%s",
			what, context.Cause(ctx), quoted("its stderr", stderr))
	}
	var said types.Error
	if json.Unmarshal(stdout, &said) != nil || said.Msg == "" {
		return fmt.Errorf("%s: %w%s%s; see the log of %s: %w", what, err, quoted("stdout", string(stdout)), quoted("stderr", stderr),
			filepath.Base(path), errdefs.ErrUnavailable)
	}
	return fmt.Errorf("%s: %w (code %d)%s: %w", what, &said, said.Code, quoted("stderr", stderr), errdefs.ErrUnavailable)
}

func quoted(name, text string) string {
	text = strings.TrimSpace(text)
	if text == "" {
		return ""
	}
	if len(text) > maxStderr {
		text = text[:maxStderr] + "..."
	}
	return fmt.Sprintf("; %s: %q", name, text)
}

func command(env []string) string {
	for i := len(env) - 1; i >= 0; i-- {
		if c, ok := strings.CutPrefix(env[i], "CNI_COMMAND="); ok {
			return c
		}
	}
	return "?"
}

// head takes the first limit bytes and fails then, which ends the copy and, by SIGPIPE, the writer.
type head struct {
	buf   []byte
	limit int
}

func (h *head) Write(p []byte) (int, error) {
	if len(h.buf)+len(p) > h.limit {
		return 0, fmt.Errorf("more than %d bytes of output", h.limit)
	}
	h.buf = append(h.buf, p...)
	return len(p), nil
}

// tail keeps the last limit bytes.
type tail struct {
	buf   []byte
	limit int
}

func (t *tail) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - t.limit; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(p), nil
}
