package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	"golang.org/x/sys/unix"
)

// found tells whether a file of one of these names is there.
func found(t *testing.T, patterns ...string) bool {
	t.Helper()
	for _, pattern := range patterns {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		if len(names) > 0 {
			return true
		}
	}
	return false
}

// await looks, all the time, whether a condition holds, until it does or done is closed.
func await(t *testing.T, done <-chan struct{}, condition func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	for !condition() {
		select {
		case <-done:
			return
		case <-deadline:
			t.Fatal("what was waited for did not come within a minute")
		case <-time.After(time.Millisecond):
		}
	}
}

func kill(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			t.Fatal(err)
		}
	}
}

// TestVMKilledWhilePodStarts kills the VMM at each step of a start. Either a cold boot takes the
// clone's place and the pod runs, or the error says that its VM is gone; no start leaves anything.
func TestVMKilledWhilePodStarts(t *testing.T) {
	var marks string
	d := harness.Start(t, func(c *harness.Config) {
		marks = filepath.Join(filepath.Dir(c.Root), "marks")
		if err := os.Mkdir(marks, 0o755); err != nil {
			t.Fatal(err)
		}
		// The plugin notes that it was called, and that it is done.
		bin := c.CNI.BinDirs
		plugin(t, "portmap", `
for dir in `+bin[0]+` `+bin[1]+`; do
	[ -x $dir/portmap ] && break
done
: > `+marks+`/begun
$dir/portmap
code=$?
: > `+marks+`/ended
exit $code
`)(c)
	})
	d.RunPod().Remove() // there is a template now
	runs := func(*testing.T) bool { return true }
	file := func(patterns ...string) func(*testing.T) bool {
		return func(t *testing.T) bool { return found(t, patterns...) }
	}
	run := filepath.Join(d.Config.State, "*")
	for _, moment := range []struct {
		name    string
		reached func(*testing.T) bool
		later   time.Duration // no event tells of what guest and daemon say to each other
	}{
		{"process", runs, 0},
		{"control socket", file(run+"/qmp.sock", run+"/api.sock"), 0},
		{"agent's channel", file(run+"/agent.sock", run+"/vsock.sock"), 0},
		{"network begins", file(marks + "/begun"), 0},
		{"network ends", file(marks + "/ended"), 0},
		{"setup", file(marks + "/ended"), 100 * time.Millisecond},
		{"later", file(marks + "/ended"), 300 * time.Millisecond},
	} {
		t.Run(moment.name, func(t *testing.T) {
			for _, name := range []string{"begun", "ended"} {
				if err := os.RemoveAll(filepath.Join(marks, name)); err != nil {
					t.Fatal(err)
				}
			}
			d := d.On(t)
			config := d.PodConfig()
			done := make(chan struct{})
			var pod *harness.Pod
			var err error
			go func() {
				defer close(done)
				pod, err = d.TryRunPod(config)
			}()
			await(t, done, func() bool { return len(vms(t)) > 0 && moment.reached(t) })
			time.Sleep(moment.later)
			kill(t, vms(t))
			<-done
			if err != nil {
				has(t, err.Error(), config.Metadata.Name, "gone")
			} else {
				pod.Remove()
			}
			none(t, d)
		})
	}
	d.RunPod().Run(images.Busybox, sleeper).Exec("true")
}

// TestVMKilledWhileTemplateIsMade kills the VMM that is to become a template: pods boot by themselves,
// and nothing is left of it.
func TestVMKilledWhileTemplateIsMade(t *testing.T) {
	for name, reached := range map[string]func(d *harness.Daemon) []string{
		"process":         func(d *harness.Daemon) []string { return []string{d.Config.State} },
		"control socket":  func(d *harness.Daemon) []string { return sockets(d, "qmp.sock", "api.sock") },
		"agent's channel": func(d *harness.Daemon) []string { return sockets(d, "agent.sock", "vsock.sock") },
	} {
		t.Run(name, func(t *testing.T) {
			d := harness.Start(t)
			await(t, nil, func() bool { return len(vmms(t, true)) > 0 && found(t, reached(d)...) })
			kill(t, vmms(t, true))
			d.RunPod().Run(images.Busybox, sleeper).Exec("true")
			has(t, d.Log(), "booted cold", "make template")
			if found(t, filepath.Join(d.Config.Root, "templates", "*")) || found(t, filepath.Join(d.Config.State, "template-*")) {
				t.Error("something is left of the template")
			}
		})
	}
}

// sockets are where the VMM of a template has these.
func sockets(d *harness.Daemon, names ...string) (all []string) {
	for _, name := range names {
		all = append(all, filepath.Join(d.Config.State, "template-*", name))
	}
	return all
}
