package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func networkReady(t *testing.T, d *harness.Daemon) (bool, string) {
	t.Helper()
	return condition(t, d, runtimeapi.NetworkReady)
}

// condition is one of the daemon's, and why it is not true.
func condition(t *testing.T, d *harness.Daemon, kind string) (bool, string) {
	t.Helper()
	r, err := d.Runtime().Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range r.Status.Conditions {
		if c.Type == kind {
			return c.Status, c.Reason + ": " + c.Message
		}
	}
	t.Fatalf("no condition %s in %v", kind, r.Status.Conditions)
	return false, ""
}

// TestGuestVanishes takes the guest's files, as the daemon keeps them, away under it.
func TestGuestVanishes(t *testing.T) {
	d := harness.Start(t)
	initrd := filepath.Join(d.Config.Root, "guest-kept", "initrd")
	become := func(want bool) (why string) {
		t.Helper()
		harness.Eventually(t, fmt.Sprint("RuntimeReady becomes ", want), func() error {
			ready, message := condition(t, d, runtimeapi.RuntimeReady)
			if why = message; ready != want {
				return missing{fmt.Sprint(want), why}
			}
			return nil
		})
		return why
	}
	become(true)
	if err := os.Rename(initrd, initrd+".away"); err != nil {
		t.Fatal(err)
	}
	has(t, become(false), initrd, "caissond guest build")
	if err := os.Rename(initrd+".away", initrd); err != nil {
		t.Fatal(err)
	}
	become(true)
}

func TestNoCNIConfiguration(t *testing.T) {
	d := harness.Start(t, func(c *harness.Config) {
		c.CNI.ConfDir = filepath.Join(filepath.Dir(c.Root), "empty")
		if err := os.Mkdir(c.CNI.ConfDir, 0o755); err != nil {
			t.Fatal(err)
		}
	})
	if ready, why := networkReady(t, d); ready || !strings.Contains(why, d.Config.CNI.ConfDir) {
		t.Errorf("ready is %v, because %q", ready, why)
	}
	pod, err := d.TryRunPod(d.PodConfig())
	if err == nil {
		pod.Remove()
		t.Fatal("a pod ran without network")
	}
	has(t, err.Error(), d.Config.CNI.ConfDir)
	// Once there is a configuration all is well, without a restart.
	harness.WriteCNI(t, d.Config.CNI.ConfDir, filepath.Join(d.Dir, "ipam"))
	harness.Eventually(t, "the network is ready", func() error {
		if ready, why := networkReady(t, d); !ready {
			return missing{"network", why}
		}
		return nil
	})
	d.RunPod()
}

// plugin puts a script in front of the CNI plugins under the name of one of them.
func plugin(t *testing.T, name, script string) func(*harness.Config) {
	return func(c *harness.Config) {
		t.Helper()
		dir := filepath.Join(filepath.Dir(c.Root), "plugins")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
		c.CNI.BinDirs = append([]string{dir}, c.CNI.BinDirs...)
	}
}

// A plugin that fails after another has done its part: all of it is undone.
func TestCNIPluginFails(t *testing.T) {
	d := harness.Start(t, plugin(t, "portmap", `
case $CNI_COMMAND in
ADD) echo '{"cniVersion": "1.0.0", "code": 117, "msg": "the hatch is stuck"}'; exit 1;;
esac
`))
	pod, err := d.TryRunPod(d.PodConfig())
	if err == nil {
		pod.Remove()
		t.Fatal("the pod ran")
	}
	has(t, err.Error(), "portmap", "the hatch is stuck")
	none(t, d)
}

func TestCNIPluginHangs(t *testing.T) {
	d := harness.Start(t, plugin(t, "portmap", `
case $CNI_COMMAND in
ADD) exec sleep 100000;;
esac
`))
	start := time.Now()
	pod, err := d.TryRunPod(d.PodConfig())
	if err == nil {
		pod.Remove()
		t.Fatal("the pod ran")
	}
	has(t, err.Error(), "portmap")
	if took := time.Since(start); took > 90*time.Second {
		t.Errorf("it took %v to give up", took)
	}
	none(t, d)
}

// none sees that there is no pod, and no VM of one.
func none(t *testing.T, d *harness.Daemon) {
	t.Helper()
	if out := d.Crictl("pods", "--quiet"); out != "" {
		t.Errorf("pods are left: %s", out)
	}
	if vms := vms(t); len(vms) > 0 {
		t.Errorf("VMs are left: %v", vms)
	}
}

// vms are the VMMs of pods in the suite's PID namespace.
func vms(t *testing.T) []int {
	t.Helper()
	return vmms(t, false)
}

// vmms are the VMMs of pods, or those that are to become templates.
func vmms(t *testing.T, templates bool) []int {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, link := range links {
		exe, err := os.Readlink(link)
		if err != nil || !strings.Contains(exe, "qemu-system") && !strings.Contains(exe, "cloud-hypervisor") {
			continue
		}
		dir, err := os.Readlink(filepath.Join(filepath.Dir(link), "cwd"))
		if err != nil || strings.HasPrefix(filepath.Base(dir), "template-") != templates {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link)))
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// fallen waits until the pod is not ready and its container has exited, and sees that both say why.
func fallen(t *testing.T, d *harness.Daemon, c *harness.Container, reason, want string) {
	t.Helper()
	harness.Eventually(t, "the pod is not ready", func() error {
		if s := c.Pod.Status(); s.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
			return fmt.Errorf("it is %v", s.State)
		}
		return nil
	})
	r, err := d.Runtime().PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: c.Pod.ID, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct{ Reason, Message string }
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil {
		t.Fatal(err)
	}
	if info.Reason != reason || !strings.Contains(info.Message, want) {
		t.Errorf("the pod: %q, %q, want %s, %q", info.Reason, info.Message, reason, want)
	}
	if s := c.Wait(); s.ExitCode != 255 || s.Reason != reason || !strings.Contains(s.Message, want) {
		t.Errorf("the container: %d, %q, %q, want 255, %s, %q", s.ExitCode, s.Reason, s.Message, reason, want)
	}
	if _, err := c.TryExec(10, "true"); err == nil {
		t.Error("an exec in the fallen pod succeeded")
	}
}

// testGuestPanic has a privileged container crash the guest's kernel.
func testGuestPanic(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext = &runtimeapi.LinuxSandboxSecurityContext{Privileged: true}
	})
	c := pod.Run(images.Busybox, sleeper, func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{Privileged: true}
	})
	_, err := c.TryExec(60, "sh", "-c", "echo c > /proc/sysrq-trigger; sleep 1000")
	if err == nil {
		t.Error("the exec that crashed the guest succeeded")
	}
	fallen(t, d, c, "VMGone", "panic")
	pod.Remove()
	// The daemon is as well as before.
	d.RunPod().Run(images.Busybox, sleeper).Exec("true")
}

// testAgentDies has a privileged container write over the code of the guest's agent. The kernel keeps
// signals from PID 1, whoever sends them, but not what the agent then does.
func testAgentDies(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext = &runtimeapi.LinuxSandboxSecurityContext{Privileged: true}
	})
	c := pod.Run(images.Busybox, sleeper, func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{
			Privileged: true, NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_NODE},
		}
	})
	_, err := c.TryExec(60, "sh", "-c", `
while read range access rest; do
	case $access in r-x*) break;; esac
done < /proc/1/maps
from=$((0x${range%-*} / 4096)) to=$((0x${range#*-} / 4096))
dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$from count=$((to - from)) conv=notrunc
sleep 1000`)
	if err == nil {
		t.Error("the exec that killed the agent succeeded")
	}
	fallen(t, d, c, "VMGone", "kill init")
	has(t, d.Crictl("inspectp", pod.ID), "VMGone", "kill init")
	pod.Remove()
	d.RunPod().Run(images.Busybox, sleeper).Exec("true")
}

// TestVMKilled kills a VMM from outside.
func TestVMKilled(t *testing.T) {
	d := harness.Start(t)
	c := d.RunPod().Run(images.Busybox, sleeper)
	pids := vms(t)
	if len(pids) != 1 {
		t.Fatalf("VMs %v, want one process per pod", pids)
	}
	if err := unix.Kill(pids[0], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	fallen(t, d, c, "VMGone", "signal: killed")
}

// frozen are a container whose VMM, of this process number, is stopped, and one of another pod.
func frozen(t *testing.T, d *harness.Daemon) (c, other *harness.Container, pid int) {
	t.Helper()
	c = d.RunPod().Run(images.Busybox, sleeper)
	pids := vms(t)
	if len(pids) != 1 {
		t.Fatalf("VMs %v, want one process per pod", pids)
	}
	other = d.RunPod().Run(images.Busybox, sleeper)
	if err := unix.Kill(pids[0], unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	return c, other, pids[0]
}

// TestGuestHangs stops a VMM: its guest answers no more. What has a limit keeps it, what has none is
// refused in time, the other pod does not notice, and the pod can be removed.
func TestGuestHangs(t *testing.T) {
	d := harness.Start(t)
	c, other, _ := frozen(t, d)
	start := time.Now()
	if _, err := c.TryExec(2, "true"); err == nil {
		t.Error("an exec in a stopped guest succeeded")
	}
	if took := time.Since(start); took > 30*time.Second {
		t.Errorf("an exec with a limit of 2 s took %v", took)
	}
	d.Crictl("pods")
	d.Crictl("ps")
	d.Crictl("stats")
	if out := other.Exec("echo", "afloat"); out != "afloat\n" {
		t.Errorf("the other pod: got %q", out)
	}
	start = time.Now()
	c.Pod.Remove()
	if took := time.Since(start); took > 60*time.Second {
		t.Errorf("removal took %v", took)
	}
	// Nor does a daemon that is started over a VMM that hangs get an answer.
	pids := vms(t)
	if len(pids) != 1 {
		t.Fatalf("VMs %v, want that of the other pod", pids)
	}
	if err := unix.Kill(pids[0], unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	d.Restart()
	if s := other.Wait(); s.ExitCode != 255 || s.Reason != "Unreachable" || s.Message == "" {
		t.Errorf("the other pod's container: %d, %q, %q", s.ExitCode, s.Reason, s.Message)
	}
	other.Pod.Remove()
	none(t, d)
}

// TestWatchdog has a guest stop for good, which nobody sees before somebody waits for it.
func TestWatchdog(t *testing.T) {
	d := harness.Start(t, func(c *harness.Config) { c.VM.Watchdog = "8s" })
	c, other, stopped := frozen(t, d)
	if _, err := c.TryExec(1, "true"); err == nil {
		t.Error("an exec in a stopped guest succeeded")
	}
	fallen(t, d, c, "Unreachable", "answered nothing for 8s")
	if left := vms(t); len(left) != 1 || left[0] == stopped {
		t.Errorf("VMs %v, want the other one", left)
	}
	if out := other.Exec("echo", "afloat"); out != "afloat\n" {
		t.Errorf("the other pod: got %q", out)
	}
	c.Pod.Remove()
	other.Pod.Remove()
	none(t, d)
}

// TestVMMMissing has no VMM to start.
func TestVMMMissing(t *testing.T) {
	d := harness.New(t, func(c *harness.Config) { c.Driver, c.VM.QEMU = "qemu", "/no/such/qemu" })
	before := harness.TakeSnapshot(t)
	err := d.Start()
	if err == nil {
		defer d.Stop()
		var pod *harness.Pod
		if pod, err = d.TryRunPod(d.PodConfig()); err == nil {
			pod.Remove()
			t.Fatal("a pod ran")
		}
	}
	has(t, err.Error(), "/no/such/qemu")
	d.Stop()
	if leaks := harness.TakeSnapshot(t).Since(before); len(leaks) > 0 {
		t.Errorf("left behind: %q", leaks)
	}
}

// TestGuestMissing has no guest to boot.
func TestGuestMissing(t *testing.T) {
	d := harness.New(t, func(c *harness.Config) { c.Guest = filepath.Join(filepath.Dir(c.Root), "no-guest") })
	err := d.Start()
	if err == nil {
		d.Stop()
		t.Fatal("the daemon started without a guest")
	}
	has(t, err.Error(), "caissond guest build")
}

func TestSecondDaemon(t *testing.T) {
	first := harness.Start(t)
	pod := first.RunPod().Run(images.Busybox, sleeper)
	second := harness.New(t, func(c *harness.Config) { c.Root, c.State = first.Config.Root, first.Config.State })
	err := second.Start()
	if err == nil {
		second.Stop()
		t.Fatal("a second daemon started on the same root")
	}
	has(t, err.Error(), first.Config.Root)
	if out := pod.Exec("echo", "unharmed"); out != "unharmed\n" {
		t.Errorf("the first daemon's pod: got %q", out)
	}
	sharing := harness.New(t, func(c *harness.Config) { c.State = first.Config.State })
	if err = sharing.Start(); err == nil {
		sharing.Stop()
		t.Fatal("a daemon started in the state of another")
	}
	has(t, err.Error(), first.Config.State, "key state")
	if out := pod.Exec("echo", "unharmed"); out != "unharmed\n" {
		t.Errorf("the first daemon's pod: got %q", out)
	}
	// With folders of its own it is welcome.
	third := harness.Start(t)
	third.RunPod().Run(images.Busybox, sleeper).Exec("true")
	if out := strings.TrimSpace(third.Crictl("pods", "--quiet")); len(strings.Fields(out)) != 1 {
		t.Errorf("the third daemon sees pods %q, want its own only", out)
	}
}

func TestUnknownKey(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte("rooot = '/x'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(harness.Bin("caissond"), "serve", "--config", file).CombinedOutput()
	if err == nil {
		t.Fatal("it started")
	}
	has(t, string(out), "line 1", "rooot", `"root"`)
}
