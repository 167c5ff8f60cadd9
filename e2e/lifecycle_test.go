package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	"github.com/caisson-vm/caisson/e2e/measure"
	"github.com/caisson-vm/caisson/podvm/vmm/cloudhv"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// testSharedPod has two containers share what containers of a pod share, and nothing else.
func testSharedPod(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod()
	first := pod.Run(images.Busybox, harness.Shell("mkdir /www; echo neighbour > /www/index.html; exec httpd -f -p 127.0.0.1:8080 -h /www"), alone)
	second := pod.Run(images.Busybox, sleeper, alone)
	harness.Eventually(t, "the first serves", func() error {
		r, err := second.TryExec(10, "wget", "-q", "-O-", "http://127.0.0.1:8080/")
		if err == nil && string(r.Stdout) != "neighbour\n" {
			err = missing{"neighbour", string(r.Stdout) + string(r.Stderr)}
		}
		return err
	})
	first.Exec("sh", "-c", "echo shared > /dev/shm/note")
	if out := second.Exec("cat", "/dev/shm/note"); out != "shared\n" {
		t.Errorf("/dev/shm: got %q", out)
	}
	has(t, second.Exec("df", "/dev/shm"), "65536")
	first.Exec("touch", "/tmp/mine")
	if r, err := second.TryExec(10, "ls", "/tmp/mine"); err != nil || r.ExitCode == 0 {
		t.Errorf("a container sees the other's files: %v, %v", r, err)
	}
	if out := second.Exec("ps"); strings.Contains(out, "httpd") {
		t.Errorf("a container sees the other's processes:\n%s", out)
	}
	shared := d.RunPod(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext = &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD}}
	})
	inPod := func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD}}
	}
	shared.Run(images.Busybox, []string{"sleep", "31415"}, inPod)
	has(t, shared.Run(images.Busybox, sleeper, inPod).Exec("ps"), "sleep 31415")
}

// testPrivileged: a privileged container has the guest's devices, and by no name the host's ends of it.
func testPrivileged(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext = &runtimeapi.LinuxSandboxSecurityContext{Privileged: true}
	})
	privileged := pod.Run(images.Busybox, sleeper, func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{Privileged: true}
	})
	if out := privileged.Exec("unshare", "-Urmpf", "sh", "-c", "mount -t proc proc /proc && echo inner"); out != "inner\n" {
		t.Errorf("a rootless container in a privileged one: %q", out)
	}
	names := strings.Fields(privileged.Exec("ls", "/dev"))
	for _, want := range []string{"kmsg", "null", "ptmx"} {
		if !slices.Contains(names, want) {
			t.Errorf("no /dev/%s among %q", want, names)
		}
	}
	for _, name := range names {
		if strings.HasPrefix(name, "vd") || strings.HasPrefix(name, "pmem") || strings.HasPrefix(name, "vport") || strings.HasPrefix(name, "ttyS") || name == "vsock" {
			t.Errorf("/dev/%s is not for containers", name)
		}
	}
	if usual := strings.Fields(d.RunPod().Run(images.Busybox, sleeper).Exec("ls", "/dev")); slices.Contains(usual, "kmsg") {
		t.Errorf("a container that is not privileged has %q", usual)
	}
}

// alone gives a container a PID namespace of its own, as the kubelet does unless a pod asks to share.
func alone(c *runtimeapi.ContainerConfig) {
	c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}}
}

// testInitContainers does as the kubelet: one after the other, each in its own container.
func testInitContainers(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod()
	for i := range 3 {
		c := pod.Run(images.Busybox, harness.Shell(fmt.Sprintf("test $(ls /dev/shm | wc -l) = %d && touch /dev/shm/init-%d", i, i)))
		if s := c.Wait(); s.ExitCode != 0 || s.Reason != "Completed" {
			t.Errorf("init container %d: %d, %q, %q", i, s.ExitCode, s.Reason, s.Message)
		}
		if i == 0 {
			c.Remove()
		}
	}
	main := pod.Run(images.Busybox, sleeper)
	if out := main.Exec("ls", "/dev/shm"); out != "init-0\ninit-1\ninit-2\n" {
		t.Errorf("got %q", out)
	}
}

func testExits(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod()
	for _, tt := range []struct {
		script string
		code   int32
		reason string
	}{
		{"exit 0", 0, "Completed"},
		{"exit 42", 42, "Error"},
		{"kill -TERM $$", 143, "Error"},
		{"kill -KILL $$", 137, "Error"},
	} {
		s := pod.Run(images.Busybox, harness.Shell("sleep 0.2; "+tt.script)).Wait()
		if s.ExitCode != tt.code || s.Reason != tt.reason {
			t.Errorf("%s: got %d, %q, %q", tt.script, s.ExitCode, s.Reason, s.Message)
		}
		if s.CreatedAt <= 0 || s.StartedAt < s.CreatedAt || s.FinishedAt < s.StartedAt || time.Since(time.Unix(0, s.FinishedAt)) > time.Minute {
			t.Errorf("%s: times %d, %d, %d", tt.script, s.CreatedAt, s.StartedAt, s.FinishedAt)
		}
	}
	lost := pod.Create(images.Busybox, []string{"no-such-command"})
	if err := lost.TryStart(); err == nil || !strings.Contains(err.Error(), `exec: "no-such-command": executable file not found in $PATH`) {
		t.Errorf("a command that is not there: %v", err)
	}
	if s := lost.Status(); s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode != 128 || s.Reason != "StartError" || !strings.Contains(s.Message, "no-such-command") {
		t.Errorf("a command that is not there: %v, %d, %q, %q", s.State, s.ExitCode, s.Reason, s.Message)
	}
	lost.Remove()
	oom := pod.Run(images.Busybox, harness.Shell("dd if=/dev/zero of=/dev/null bs=40M"), func(c *runtimeapi.ContainerConfig) {
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 20 << 20, MemorySwapLimitInBytes: 20 << 20}
	})
	if s := oom.Wait(); s.Reason != "OOMKilled" || s.ExitCode != 137 {
		t.Errorf("out of memory: got %d, %q", s.ExitCode, s.Reason)
	}
}

func testGrace(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod()
	polite := pod.Run(images.Busybox, harness.Shell("trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.1; done"))
	deaf := pod.Run(images.Busybox, harness.Shell("trap '' TERM; echo up; while :; do sleep 0.1; done"))
	for _, c := range []*harness.Container{polite, deaf} {
		harness.Eventually(t, "the container is up", func() error {
			if out := c.Output("stdout"); !strings.Contains(out, "up") {
				return missing{"up", out}
			}
			return nil
		})
	}
	start := time.Now()
	polite.Stop(60)
	if s := polite.Status(); s.ExitCode != 5 || time.Since(start) > 30*time.Second {
		t.Errorf("polite: exit code %d after %v", s.ExitCode, time.Since(start))
	}
	if out := polite.Output("stdout"); !strings.HasSuffix(out, "bye\n") {
		t.Errorf("polite: the log has %q", out)
	}
	start = time.Now()
	deaf.Stop(2)
	if s := deaf.Status(); s.ExitCode != 137 || time.Since(start) < 2*time.Second {
		t.Errorf("deaf: exit code %d after %v", s.ExitCode, time.Since(start))
	}
}

// testTerminationMessage has a container write where the kubelet mounts a file for it.
func testTerminationMessage(t *testing.T, d *harness.Daemon) {
	file := filepath.Join(t.TempDir(), "message")
	if err := os.WriteFile(file, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	c := d.RunPod().Run(images.Busybox, harness.Shell("echo it was the pressure > /dev/termination-log; exit 1"), func(c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{{HostPath: file, ContainerPath: "/dev/termination-log"}}
	})
	c.Wait()
	// It is there as soon as the exit is visible: no waiting here.
	if message, err := os.ReadFile(file); err != nil || string(message) != "it was the pressure\n" {
		t.Errorf("got %q, %v", message, err)
	}
}

func testResources(t *testing.T, d *harness.Daemon) {
	c := d.RunPod().Run(images.Busybox, sleeper, func(c *runtimeapi.ContainerConfig) {
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, MemoryLimitInBytes: 64 << 20}
	})
	if out := c.Exec("cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max"); out != "67108864\n50000 100000\n" {
		t.Errorf("got %q", out)
	}
	_, err := d.Runtime().UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: c.ID, Linux: &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 70000, MemoryLimitInBytes: 96 << 20},
	})
	if err != nil {
		t.Fatal(err)
	}
	if out := c.Exec("cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max"); out != "100663296\n70000 100000\n" {
		t.Errorf("after the update: got %q", out)
	}
	if m := c.Status().GetResources().GetLinux().GetMemoryLimitInBytes(); m != 96<<20 {
		t.Errorf("the status says %d bytes", m)
	}
}

// testSize: a pod's VM is as large as the pod may be, and follows when that changes.
func testSize(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 640 << 20}
	})
	c := pod.Run(images.Busybox, sleeper, func(c *runtimeapi.ContainerConfig) {
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 640 << 20}
	})
	size := func() (mib, cpus int) {
		t.Helper()
		if _, err := fmt.Sscanf(c.Exec("sh", "-c", "awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo; grep -c ^processor /proc/cpuinfo"), "%d\n%d\n", &mib, &cpus); err != nil {
			t.Fatal(err)
		}
		return mib, cpus
	}
	update := func(memory, cpus int64) error {
		_, err := d.Runtime().UpdatePodSandboxResources(t.Context(), &runtimeapi.UpdatePodSandboxResourcesRequest{
			PodSandboxId: pod.ID, Resources: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: memory, CpuPeriod: 100000, CpuQuota: cpus * 100000},
		})
		return err
	}
	// The guest's own kernel and its tables have some of it; and there is more of it where it is plugged in
	// by larger blocks.
	more := 64
	if harness.Driver() == cloudhv.Name {
		more += 128
	}
	if mib, _ := size(); mib < 640 || mib > 640+more {
		t.Errorf("a pod that may use 640 MiB has %d", mib)
	}
	wanted := int64(min(2, runtime.NumCPU()))
	if err := update(896<<20, wanted); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, "what was added is in use", func() error {
		if mib, cpus := size(); mib < 896 || mib > 896+more || cpus != int(wanted) {
			return fmt.Errorf("a pod that may use 896 MiB and %d CPUs has %d and %d", wanted, mib, cpus)
		}
		return nil
	})
	if err := update(1<<60, wanted); status.Code(err) != codes.OutOfRange {
		t.Errorf("more than the node has: %v", err)
	}
	if err := update(640<<20, 1); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, "memory is given back", func() error {
		if mib, _ := size(); mib >= 896 {
			return fmt.Errorf("the guest has %d MiB", mib)
		}
		return nil
	})
}

// testFreedMemory: what a clone has plugged in, used and freed the node has back, while the pod keeps its
// size.
func testFreedMemory(t *testing.T, d *harness.Daemon) {
	if harness.Driver() != cloudhv.Name {
		t.Skipf("clones of %s have no balloon", harness.Driver())
	}
	pod := d.RunPod(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 << 30}
		c.Linux.SecurityContext = &runtimeapi.LinuxSandboxSecurityContext{Privileged: true}
	})
	c := pod.Run(images.Busybox, sleeper, func(c *runtimeapi.ContainerConfig) {
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 << 30}
		c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{Privileged: true}
	})
	used := func() float64 {
		t.Helper()
		w, err := measure.Weigh(pod.ID)
		if err != nil {
			t.Fatal(err)
		}
		return w.PSS / (1 << 20)
	}
	before := used()
	c.Exec("sh", "-c", "mkdir /big && mount -t tmpfs -o size=800m none /big && dd if=/dev/zero of=/big/file bs=1M count=700 2>/dev/null")
	full := used()
	if full < before+600 {
		t.Fatalf("the VM takes %.0f MiB with a file of 700, and %.0f without", full, before)
	}
	c.Exec("rm", "/big/file")
	harness.Eventually(t, "the node has memory back", func() error {
		// What is in the template's file is not given back: at most what a VM starts with.
		if now := used(); now > full-300 {
			return fmt.Errorf("the VM takes %.0f MiB, and took %.0f", now, full)
		}
		return nil
	})
}

func testStats(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod()
	c := pod.Run(images.Busybox, harness.Shell("dd if=/dev/urandom of=/data bs=1M count=8 2>/dev/null; sync; echo written; while :; do :; done"))
	harness.Eventually(t, "the data is written", func() error {
		if out := c.Output("stdout"); out != "written\n" {
			return missing{"written", out}
		}
		return nil
	})
	first := stats(t, d, c)
	harness.Eventually(t, "the CPU time grows", func() error {
		if now := stats(t, d, c); now.Cpu.UsageCoreNanoSeconds.Value <= first.Cpu.UsageCoreNanoSeconds.Value {
			return fmt.Errorf("it is %d", now.Cpu.UsageCoreNanoSeconds.Value)
		}
		return nil
	})
	if m := first.Memory.GetWorkingSetBytes().GetValue(); m == 0 || m > 512<<20 {
		t.Errorf("working set of %d bytes", m)
	}
	harness.Eventually(t, "the writable layer is counted", func() error {
		if b := stats(t, d, c).GetWritableLayer().GetUsedBytes().GetValue(); b < 8<<20 || b > 64<<20 {
			return fmt.Errorf("it has %d bytes", b)
		}
		return nil
	})
	r, err := d.Runtime().PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: pod.ID})
	if err != nil {
		t.Fatal(err)
	}
	linux := r.Stats.Linux
	if linux.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 || linux.GetMemory().GetWorkingSetBytes().GetValue() == 0 || len(linux.GetContainers()) != 1 {
		t.Errorf("the pod's stats are %v", linux)
	}
	if linux.GetNetwork().GetDefaultInterface().GetName() != "eth0" {
		t.Errorf("the pod's network stats are %v", linux.GetNetwork())
	}
	ofPod, ofContainer := metrics(t, d, pod)
	if _, ok := ofContainer["container_cpu_user_seconds_total"]; !ok || ofContainer["container_memory_cache"] == 0 ||
		ofContainer["container_fs_writes_total"] == 0 || ofContainer["container_fs_writes_bytes_total"] < 1<<20 || ofContainer["container_last_seen"] == 0 {
		t.Errorf("the container's metrics are %v", ofContainer)
	}
	if _, ok := ofPod["container_network_receive_packets_total"]; !ok || ofPod["container_cpu_usage_seconds_total"] < ofContainer["container_cpu_usage_seconds_total"] {
		t.Errorf("the pod's metrics are %v", ofPod)
	}
	c.Stop(0)
	if _, now := metrics(t, d, pod); len(now) != 1 || now["container_fs_usage_bytes"] < 8<<20 {
		t.Errorf("the metrics of a container that has exited are %v", now)
	}
}

// metrics are a pod's, and its one container's: sums over the labels that they have beside.
func metrics(t *testing.T, d *harness.Daemon, pod *harness.Pod) (ofPod, ofContainer map[string]uint64) {
	t.Helper()
	r, err := d.Runtime().ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	sums := func(all []*runtimeapi.Metric) map[string]uint64 {
		values := map[string]uint64{}
		for _, m := range all {
			values[m.Name] += m.GetValue().GetValue()
		}
		return values
	}
	for _, p := range r.PodMetrics {
		if p.PodSandboxId == pod.ID && len(p.ContainerMetrics) == 1 {
			return sums(p.Metrics), sums(p.ContainerMetrics[0].Metrics)
		}
	}
	t.Fatalf("no metrics of pod %s with one container in %v", pod.ID, r.PodMetrics)
	return nil, nil
}

func stats(t *testing.T, d *harness.Daemon, c *harness.Container) *runtimeapi.ContainerStats {
	t.Helper()
	r, err := d.Runtime().ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: c.ID})
	if err != nil {
		t.Fatal(err)
	}
	if r.Stats.GetCpu().GetUsageCoreNanoSeconds() == nil {
		t.Fatalf("got %v", r.Stats)
	}
	return r.Stats
}
