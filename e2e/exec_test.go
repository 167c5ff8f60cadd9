package e2e

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	"golang.org/x/net/websocket"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sleeper is a command that waits until it is told to end.
var sleeper = harness.Shell("trap 'exit 0' TERM; sleep 100000 & wait")

func testExec(t *testing.T, d *harness.Daemon) {
	c := d.RunPod().Run(images.Busybox, sleeper, func(c *runtimeapi.ContainerConfig) {
		c.Envs = []*runtimeapi.KeyValue{{Key: "DEPTH", Value: []byte("40 m")}}
		c.WorkingDir = "/tmp"
	})
	t.Run("environment", func(t *testing.T) {
		if out := c.Exec("sh", "-c", "echo $DEPTH; pwd"); out != "40 m\n/tmp\n" {
			t.Errorf("got %q", out)
		}
	})
	t.Run("exit code and streams", func(t *testing.T) {
		r, err := c.TryExec(60, "sh", "-c", "echo out; echo err >&2; exit 7")
		if err != nil {
			t.Fatal(err)
		}
		if string(r.Stdout) != "out\n" || string(r.Stderr) != "err\n" || r.ExitCode != 7 {
			t.Errorf("got %q, %q, %d", r.Stdout, r.Stderr, r.ExitCode)
		}
	})
	t.Run("killed by a signal", func(t *testing.T) {
		r, err := c.TryExec(60, "sh", "-c", "kill -KILL $$")
		if err != nil || r.ExitCode != 137 {
			t.Errorf("got %v, %v, want 137", r, err)
		}
	})
	t.Run("time limit", func(t *testing.T) {
		start := time.Now()
		_, err := c.TryExec(1, "sleep", "100")
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("got %v, want DeadlineExceeded", err)
		}
		if took := time.Since(start); took > 30*time.Second {
			t.Errorf("took %v", took)
		}
		harness.Eventually(t, "the command is killed", func() error {
			if r, err := c.TryExec(60, "pgrep", "-f", "^sleep 100$"); err != nil || r.ExitCode == 0 {
				return errors.Join(err, missing{"end", string(r.GetStdout())})
			}
			return nil
		})
	})
	t.Run("no such program", func(t *testing.T) {
		r, err := c.TryExec(60, "no-such-program")
		if err == nil && r.ExitCode != 127 && r.ExitCode != 126 {
			t.Errorf("got %v", r)
		}
		if err != nil {
			has(t, err.Error(), "no-such-program")
		}
	})
	t.Run("more output than a message takes", func(t *testing.T) {
		r, err := c.TryExec(60, "sh", "-c", "dd if=/dev/zero bs=1M count=40 2>/dev/null")
		if err != nil {
			// The client's limit is 16 MiB; a runtime may refuse or cut, but must say so.
			has(t, err.Error(), "16")
		} else if len(r.Stdout) > 16<<20 {
			t.Errorf("got %d bytes", len(r.Stdout))
		}
	})
	t.Run("standard input and half-close", func(t *testing.T) {
		cmd := d.CrictlCommand(t.Context(), "exec", "--interactive", c.ID, "sh", "-c", "cat; echo end")
		text := strings.Repeat("all that goes in comes out\n", 20000)
		cmd.Stdin = strings.NewReader(text)
		out, err := cmd.Output()
		if err != nil || string(out) != text+"end\n" {
			t.Errorf("got %d bytes, want %d, %v", len(out), len(text)+4, err)
		}
	})
	t.Run("exit code through a stream", func(t *testing.T) {
		err := d.CrictlCommand(t.Context(), "exec", c.ID, "sh", "-c", "exit 3").Run()
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Errorf("got %v, want a failure", err)
		}
	})
	t.Run("through a WebSocket", func(t *testing.T) { testWebSocket(t, d, c) })
	t.Run("client goes away", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var out bytes.Buffer
		cmd := d.CrictlCommand(ctx, "exec", c.ID, "sleep", "4444")
		cmd.Stdout = &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		harness.Eventually(t, "the command runs", func() error {
			r, err := c.TryExec(60, "pgrep", "-f", "^sleep 4444$")
			if err == nil && r.ExitCode != 0 {
				err = errors.New("it doesn't")
			}
			return err
		})
		cancel()
		_ = cmd.Wait()
		// The container is untouched.
		c.Exec("true")
	})
}

// testWebSocket speaks the protocol of remote commands over a WebSocket: each message begins with
// the number of its channel. crictl knows only its fifth version, of which CRI servers have none.
func testWebSocket(t *testing.T, d *harness.Daemon, c *harness.Container) {
	r, err := d.Runtime().Exec(t.Context(), &runtimeapi.ExecRequest{
		ContainerId: c.ID, Cmd: []string{"sh", "-c", "echo out; echo err >&2; exit 3"}, Stdout: true, Stderr: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	config, err := websocket.NewConfig(strings.Replace(r.Url, "http", "ws", 1), r.Url)
	if err != nil {
		t.Fatal(err)
	}
	config.Protocol = []string{"v4.channel.k8s.io"}
	ws, err := config.DialContext(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	channels := map[byte]string{}
	for {
		var message []byte
		if err := websocket.Message.Receive(ws, &message); err != nil {
			break
		}
		if len(message) > 0 {
			channels[message[0]] += string(message[1:])
		}
	}
	if channels[1] != "out\n" || channels[2] != "err\n" || !strings.Contains(channels[3], `"ExitCode","message":"3"`) {
		t.Errorf("got %q", channels)
	}
}

// testTerminal execs with a terminal of a given size, through script(1)'s pseudo-terminal.
func testTerminal(t *testing.T, d *harness.Daemon) {
	c := d.RunPod().Run(images.Busybox, sleeper)
	crictl := d.CrictlCommand(t.Context(), "exec", "--interactive", "--tty", c.ID, "sh", "-c", "'until stty size | grep 33; do :; done; tty'")
	cmd := exec.CommandContext(t.Context(), "script", "--quiet", "--return", "--command", "stty rows 33 cols 111; "+strings.Join(crictl.Args, " "), "/dev/null")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	has(t, string(out), "33 111", "/dev/pts/")
}

func testBadExec(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod()
	created := pod.Create(images.Busybox, sleeper)
	if _, err := created.TryExec(10, "true"); err == nil {
		t.Error("exec in a container that was not started succeeded")
	} else {
		has(t, err.Error(), "not running")
	}
	stopped := pod.Run(images.Busybox, harness.Shell("exit 0"))
	stopped.Wait()
	_, err := stopped.TryExec(10, "true")
	if code := status.Code(err); code == codes.OK || code == codes.NotFound {
		t.Errorf("exec in a stopped container: got %v", err)
	} else {
		has(t, err.Error(), "not running", "exited")
	}
	ghost := &harness.Container{ID: strings.Repeat("0", 64), Pod: pod}
	if _, err := ghost.TryExec(10, "true"); status.Code(err) != codes.NotFound {
		t.Errorf("exec in no container: got %v, want NotFound", err)
	}
	if out, err := d.TryCrictl("exec", stopped.ID, "true"); err == nil {
		t.Errorf("a streamed exec in a stopped container succeeded: %q", out)
	}
}
