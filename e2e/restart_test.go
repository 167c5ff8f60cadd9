package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestRestart kills the daemon and starts it again, several times, under pods that don't care.
func TestRestart(t *testing.T) {
	d := harness.Start(t)
	pod := d.RunPod()
	writer := pod.Run(images.Busybox, harness.Shell("i=0; while [ ! -e /stop ]; do i=$((i+1)); echo $i; [ $((i % 50)) = 0 ] && usleep 10000; done; true"))
	quitter := pod.Run(images.Busybox, harness.Shell("while [ ! -e /quit ]; do sleep 0.1; done; echo last words; exit 9"))
	made := pod.Create(images.Busybox, sleeper)
	gone := pod.Run(images.Busybox, harness.Shell("exit 4"))
	gone.Wait()
	ip, vm := pod.Status().Network.Ip, vms(t)

	for i := range 3 {
		grows(t, writer)
		if i == 1 {
			// It ends while nobody looks.
			quitter.Exec("sh", "-c", "(sleep 1; touch /quit) &")
		}
		d.Kill()
		time.Sleep(2 * time.Second) // the downtime itself
		if err := d.Start(); err != nil {
			t.Fatalf("start again: %v\n%s", err, d.Log())
		}
		if s := pod.Status(); s.State != runtimeapi.PodSandboxState_SANDBOX_READY || s.Network.Ip != ip {
			t.Errorf("restart %d: the pod is %v at %s, was at %s", i, s.State, s.Network.Ip, ip)
		}
		if out := writer.Exec("echo", "alive"); out != "alive\n" {
			t.Errorf("restart %d: exec gave %q", i, out)
		}
	}
	if now := vms(t); len(now) != 1 || now[0] != vm[0] {
		t.Errorf("VMs %v, before the restarts %v", now, vm)
	}
	if s := quitter.Wait(); s.ExitCode != 9 || quitter.Output("stdout") != "last words\n" {
		t.Errorf("what ended during the downtime: %d, %q, log %q", s.ExitCode, s.Reason, quitter.Output("stdout"))
	}
	if s := gone.Status(); s.ExitCode != 4 || s.State != runtimeapi.ContainerState_CONTAINER_EXITED {
		t.Errorf("what had ended before: %v, %d", s.State, s.ExitCode)
	}
	if s := made.Status(); s.State != runtimeapi.ContainerState_CONTAINER_CREATED {
		t.Errorf("what was only created: %v", s.State)
	}
	made.Start()
	made.Exec("true")
	if _, err := writer.TryExec(30, "touch", "/stop"); err != nil { // it may be killed with the container
		t.Fatal(err)
	}
	if s := writer.Wait(); s.ExitCode != 0 {
		t.Errorf("the writer: %d, %q", s.ExitCode, s.Message)
	}
	text := writer.Output("stdout")
	numbered(t, text, len(strings.Fields(text)))
	// New work on the old pod and a new one.
	pod.Run(images.Busybox, sleeper).Exec("true")
	d.RunPod().Run(images.Busybox, sleeper).Exec("true")
}

// grows waits until the log has grown.
func grows(t *testing.T, c *harness.Container) {
	t.Helper()
	size := func() int64 {
		info, err := os.Stat(c.LogFile())
		if err != nil {
			return 0
		}
		return info.Size()
	}
	before := size()
	harness.Eventually(t, "the log grows", func() error {
		if now := size(); now < before+500 {
			return fmt.Errorf("%d bytes, were %d", now, before)
		}
		return nil
	})
}

// TestKilledWhilePodStarts kills the daemon at moments during a pod's start. The next one finishes
// or undoes what the first began; a retry of the same pod works, and nothing leaks.
func TestKilledWhilePodStarts(t *testing.T) {
	d := harness.Start(t)
	d.Pull(images.Busybox)
	for _, after := range []time.Duration{20 * time.Millisecond, 200 * time.Millisecond, time.Second, 3 * time.Second} {
		config := d.PodConfig()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		client := d.Runtime()
		go func() {
			defer close(done)
			_, _ = client.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
		}()
		time.Sleep(after)
		d.Restart()
		<-done
		cancel()
		pod, err := d.TryRunPod(config)
		if err != nil {
			t.Fatalf("killed after %v: a retry: %v", after, err)
		}
		pod.Run(images.Busybox, sleeper).Exec("true")
		pod.Remove()
		none(t, d)
	}
}

// TestReboot ends all processes and wipes what a reboot wipes.
func TestReboot(t *testing.T) {
	d := harness.Start(t)
	pod := d.RunPod()
	c := pod.Run(images.Busybox, harness.Shell("echo before; exec sleep 100000"))
	ended := pod.Run(images.Busybox, harness.Shell("exit 3"))
	ended.Wait()
	id := d.Pull(images.Busybox)
	d.Kill()
	for _, vm := range vms(t) {
		if err := unix.Kill(vm, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	harness.Eventually(t, "the VMs are gone", func() error {
		if left := vms(t); len(left) > 0 {
			return fmt.Errorf("%v", left)
		}
		return nil
	})
	wipe(t, d)
	if err := d.Start(); err != nil {
		t.Fatalf("start after the reboot: %v\n%s", err, d.Log())
	}
	if s := pod.Status(); s.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("the pod is %v", s.State)
	}
	if s := c.Status(); s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode == 0 {
		t.Errorf("the container is %v, %d", s.State, s.ExitCode)
	}
	if s := ended.Status(); s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode != 3 {
		t.Errorf("what had ended before is %v, %d", s.State, s.ExitCode)
	}
	if again := d.Pull(images.Busybox); again != id {
		t.Errorf("the image is %s, was %s", again, id)
	}
	// The kubelet makes the pod anew with the next attempt.
	next := d.RunPod(func(p *runtimeapi.PodSandboxConfig) {
		p.Metadata = &runtimeapi.PodSandboxMetadata{Name: pod.Config.Metadata.Name, Namespace: pod.Config.Metadata.Namespace, Uid: pod.Config.Metadata.Uid, Attempt: 1}
	})
	next.Run(images.Busybox, sleeper).Exec("true")
}

// wipe undoes by hand what a reboot undoes: links, network namespaces, mounts, the state folder.
func wipe(t *testing.T, d *harness.Daemon) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(mounts)) {
		at := strings.Fields(l)[1]
		if strings.HasPrefix(at, d.Dir) || strings.HasPrefix(at, "/run/netns/") || strings.HasPrefix(at, "/run/caisson") {
			if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
				t.Fatalf("unmount %s: %v", at, err)
			}
		}
	}
	for _, dir := range []string{d.Config.State, "/run/netns", "/run/caisson"} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for _, e := range entries {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestUnreadableRecord damages a pod's record. The daemon starts, says so, and keeps the file; the pod, which
// nobody can know again, has no VM any more.
func TestUnreadableRecord(t *testing.T) {
	d := harness.Start(t)
	pod := d.RunPod()
	healthy := d.RunPod().Run(images.Busybox, sleeper)
	d.Kill()
	record := filepath.Join(d.Config.Root, "pods", pod.ID, "pod.json")
	if err := os.WriteFile(record, []byte("{ half a rec"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(); err != nil {
		t.Fatalf("start: %v\n%s", err, d.Log())
	}
	if s := pod.Status(); s.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("the damaged pod is %v", s.State)
	}
	if data, err := os.ReadFile(record); err != nil || string(data) != "{ half a rec" {
		t.Errorf("the record is now %q, %v", data, err)
	}
	if pids := vms(t); len(pids) != 1 {
		t.Errorf("VMs %v, want that of the healthy pod", pids)
	}
	healthy.Exec("true")
	has(t, d.Log(), pod.ID[:12])
}
