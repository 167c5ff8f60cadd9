package network

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// daemonOf, in the environment of the test binary, makes it a daemon that sets up a pod's network.
const daemonOf = "CAISSON_NETWORK_DAEMON"

type daemonWork struct {
	Options Options
	Pod     Pod
}

// beDaemon is what the tests of a daemon that dies kill.
func beDaemon(text string) error {
	var w daemonWork
	if err := json.Unmarshal([]byte(text), &w); err != nil {
		return err
	}
	_, err := New(w.Options).Setup(context.Background(), w.Pod)
	return fmt.Errorf("setup ended: %w", err)
}

// A daemon that is killed while a plugin runs leaves it to its work, and the next one calls DEL when
// it has ended; or has killed it, where it never ends.
func TestPluginOutlivesTheDaemon(t *testing.T) {
	// Opening the pipe for reading waits until the test opens it for writing.
	const body = `[ $CNI_COMMAND = DEL ] && exit 0
echo $$ >$(dirname $0)/../child.new; mv $(dirname $0)/../child.new $(dirname $0)/../child
read line <$(dirname $0)/../pipe
echo DONE >>$(dirname $0)/../calls`
	for name, c := range map[string]struct {
		ends  bool
		calls string
	}{
		"and ends":       {true, "ADD DONE DEL"},
		"and never ends": {false, "ADD DEL"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newScriptNode(t, "1.0.0", body)
			pipe := filepath.Join(n.dir, "pipe")
			if err := unix.Mkfifo(pipe, 0o600); err != nil {
				t.Fatal(err)
			}
			p := n.pod(1)
			killDaemonInADD(t, n, p)
			if !c.ends {
				n.o.Timeout = 200 * time.Millisecond
			}
			n.CNI = New(n.o)
			done := make(chan error, 1)
			go func() { done <- n.Teardown(t.Context(), p) }()
			if c.ends {
				awaitBlocked(t)
				f, err := os.OpenFile(pipe, os.O_WRONLY, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if _, err := f.WriteString("go on\n"); err != nil {
					t.Fatal(err)
				}
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if got := n.calls(t); got != c.calls {
				t.Errorf("called %s, want %s", got, c.calls)
			}
			n.wantChildGone(t)
		})
	}
}

// killDaemonInADD kills a daemon when the plugin says that it runs.
func killDaemonInADD(t *testing.T, n *node, p Pod) {
	t.Helper()
	work, err := json.Marshal(daemonWork{n.o, p})
	if err != nil {
		t.Fatal(err)
	}
	daemon := exec.Command("/proc/self/exe")
	daemon.Env = append(os.Environ(), daemonOf+"="+string(work))
	daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	var out bytes.Buffer
	daemon.Stdout, daemon.Stderr = &out, &out
	daemon.WaitDelay = time.Second // the plugin has the daemon's stderr
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, "the plugin runs", func() bool {
		_, err := os.Stat(filepath.Join(n.dir, "child"))
		return err == nil
	})
	if err := daemon.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := daemon.Wait(); err == nil {
		t.Fatalf("the daemon ended by itself: %s", out.String())
	}
}

// awaitBlocked waits until this process waits for a lock of a file. /proc/locks would not say so in a PID
// namespace, because who took the lock has ended.
func awaitBlocked(t *testing.T) {
	t.Helper()
	inFlock := fmt.Sprintf("%d ", unix.SYS_FLOCK)
	await(t, "the next daemon waits", func() bool {
		files, err := filepath.Glob("/proc/self/task/*/syscall")
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(files, func(file string) bool {
			call, err := os.ReadFile(file)
			return err == nil && strings.HasPrefix(string(call), inFlock)
		})
	})
}

func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("still not so: ", what)
		}
	}
}

// What a plugin leaves running, which has the record open, holds nobody up.
func TestPluginLeavesAProcess(t *testing.T) {
	n := newScriptNode(t, "1.0.0", `[ $CNI_COMMAND = DEL ] && exit 0
sleep 600 & echo $! >$(dirname $0)/../child; exit 1`)
	if _, err := n.Setup(t.Context(), n.pod(1)); err == nil {
		t.Fatal("the script succeeded")
	}
	n.wantNothingLeft(t)
	if got := n.calls(t); got != "ADD DEL" {
		t.Errorf("called %s, want ADD DEL", got)
	}
	child, err := os.ReadFile(filepath.Join(n.dir, "child"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(child)))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Error("it did not run: ", err)
	}
}
