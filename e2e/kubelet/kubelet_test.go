// Package kubelet drives a real kubelet whose runtime is Caisson, both as systemd units on a machine
// that is theirs: the emulated node (make e2e-node). The kubelet has no cluster; its pods are static.
package kubelet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
)

// TestKubelet is one story: each part finds the pods that those before it have left.
func TestKubelet(t *testing.T) {
	m := newMachine(t)
	for _, part := range []struct {
		name string
		run  func(*machine, *testing.T)
	}{
		{"Start", (*machine).testStart},
		{"Pod", (*machine).testPod},
		{"Size", (*machine).testSize},
		{"Limits", (*machine).testLimits},
		{"Resize", (*machine).testResize},
		{"Stats", (*machine).testStats},
		{"Probes", (*machine).testProbes},
		{"CrashLoop", (*machine).testCrashLoop},
		{"Volumes", (*machine).testVolumes},
		{"KubeletRestart", (*machine).testKubeletRestart},
		{"DaemonRestart", (*machine).testDaemonRestart},
		{"Logs", (*machine).testLogs},
		{"Clock", (*machine).testClock},
		{"Deletion", (*machine).testDeletion},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.run(m, t) }) {
			return
		}
	}
}

func (m *machine) testStart(t *testing.T) {
	begin := time.Now()
	m.start(t, "caissond.service")
	t.Logf("%6.1f s: the daemon is ready", time.Since(begin).Seconds())
	m.start(t, "kubelet.service")
	eventually(t, "the kubelet is healthy and has its list of pods", func() error {
		if _, err := call("GET", "/healthz"); err != nil {
			return err
		}
		_, err := pods()
		return err
	})
	t.Logf("Caisson runs VMs with %s", crictl(t, "info", "--output", "go-template", "--template", "{{.driver}} {{.driverVersion}}"))
}

// pair is a pod of two containers that share an emptyDir, which an init container has filled.
var pair = `apiVersion: v1
kind: Pod
metadata:
  name: pair
  labels: {app: pair}
spec:
  terminationGracePeriodSeconds: 5
  volumes:
  - {name: shared, emptyDir: {}}
  - name: about
    downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}
  initContainers:
  - name: first
    image: ` + images.Busybox + `
    command: [sh, -c, 'echo from the first > /shared/index.html; cat /about/labels']
    resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {cpu: 100m, memory: 64Mi}}
    volumeMounts: [{name: shared, mountPath: /shared}, {name: about, mountPath: /about}]
  containers:
  - name: web
    image: ` + images.Busybox + `
    command: [sh, -c, 'echo serving; exec httpd -f -p 8080 -h /shared']
    livenessProbe: {httpGet: {path: /index.html, port: 8080}, periodSeconds: 3, timeoutSeconds: 20, failureThreshold: 2}
    resources: {requests: {cpu: 50m, memory: 32Mi}, limits: {cpu: 500m, memory: 256Mi}}
    volumeMounts: [{name: shared, mountPath: /shared}]
  - name: worker
    image: ` + images.Busybox + `
    command: [sh, -c, 'touch /shared/ready; i=0; while :; do i=$((i+1)); echo $i; sleep 0.5; done']
    readinessProbe: {exec: {command: [cat, /shared/ready]}, periodSeconds: 3, timeoutSeconds: 20}
    resources: {requests: {cpu: 50m, memory: 32Mi}, limits: {cpu: 500m, memory: 512Mi}}
    volumeMounts: [{name: shared, mountPath: /shared}]
`

func (m *machine) testPod(t *testing.T) {
	m.apply(t, "pair", pair)
	p := m.await(t, "a pod with an init container and probes is ready", "pair", ready)
	first := p.container("first").State.Terminated
	if first == nil || first.ExitCode != 0 || first.Reason != "Completed" {
		t.Errorf("the init container: %+v", p.container("first"))
	}
	for _, c := range []struct{ container, command, want string }{
		{"web", "cat /shared/index.html", "from the first\n"},
		{"worker", "wget -qO- http://127.0.0.1:8080/", "from the first\n"},
		{"worker", "wget -qO- http://" + p.Status.PodIP + ":8080/", "from the first\n"},
		{"worker", "cat /etc/resolv.conf", "nameserver " + nameserver},
		{"worker", "cat /etc/hosts", p.Status.PodIP},
		{"worker", "hostname", "pair-" + m.name},
	} {
		if out, err := m.run("pair", c.container, c.command); err != nil || !strings.Contains(out, c.want) {
			t.Errorf("%s in %s: %q, %v; want %q", c.command, c.container, out, err, c.want)
		}
	}
	for container, want := range map[string]string{"first": "app=\"pair\"", "web": "serving"} {
		if text, err := os.ReadFile(p.logFile(container)); err != nil || !strings.Contains(string(text), want) {
			t.Errorf("log of %s: %q, %v; want %q", container, text, err, want)
		}
	}
	if text, err := call("GET", "/containerLogs/default/pair-"+m.name+"/web"); err != nil || string(text) != "serving\n" {
		t.Errorf("log by the kubelet: %q, %v", text, err)
	}
}

// wide says what it sees of its VM, whose size its limits are.
var wide = `apiVersion: v1
kind: Pod
metadata: {name: wide}
spec:
  restartPolicy: Never
  containers:
  - name: wide
    image: ` + images.Busybox + `
    command: [sh, -c, 'grep -c ^processor /proc/cpuinfo; grep MemTotal /proc/meminfo']
    resources: {requests: {cpu: 50m, memory: 32Mi}, limits: {cpu: 1500m, memory: 1Gi}}
`

// testSize compares limits (0.5 and 0.5 CPUs, 256 and 512 MiB; 1.5 CPUs, 1 GiB) with the sizes of VMs
// and with the limits of a pod's cgroup, in which the VMM must be: of memory there is room for it, too.
func (m *machine) testSize(t *testing.T) {
	p := m.await(t, "the pod is still ready", "pair", ready)
	group := cgroup(p)
	if text, err := os.ReadFile(filepath.Join(group, "cpu.max")); err != nil || string(text) != "100000 100000\n" {
		t.Errorf("cpu.max of the pod's cgroup: %q, %v", text, err)
	}
	text, err := os.ReadFile(filepath.Join(group, "memory.max"))
	if n, _ := strconv.Atoi(strings.TrimSpace(string(text))); err != nil || n < 832<<20 || n > 896<<20 {
		t.Errorf("memory.max of the pod's cgroup: %q, %v; want 768 MiB and room for the VM", text, err)
	}
	if vmm := vmms(t, group); len(vmm) != 1 {
		t.Errorf("VMMs in the pod's cgroup: %v", vmm)
	}
	out, err := m.run("pair", "worker", "cat /proc/meminfo")
	if mib := memTotal(out); err != nil || mib < 700 || mib > 960 {
		t.Errorf("%d MiB in the VM, %v; want 768 and a little more", mib, err)
	}
	m.apply(t, "wide", wide)
	p = m.await(t, "a pod with larger limits has run", "wide", func(p pod) bool { return p.Status.Phase == "Succeeded" })
	lines, err := harness.ReadLog(p.logFile("wide"))
	if err != nil || len(lines) != 2 {
		t.Fatalf("its log: %v, %v", lines, err)
	}
	if mib := memTotal(lines[1].Text); lines[0].Text != "2" || mib < 950 || mib > 1300 {
		t.Errorf("%s CPUs, %d MiB in its VM; want 2, and 1024 and a little more", lines[0].Text, mib)
	}
	m.remove(t, "wide")
}

// full is a pod in which one container stays just below its limit of memory, and another exceeds its own: the VM
// of both, which takes more than they may, is not what ends.
var full = `apiVersion: v1
kind: Pod
metadata: {name: full}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: below
    image: ` + images.Busybox + `
    command: [sh, -c, 'dd if=/dev/zero of=/dev/shm/x bs=1M count=56 && touch /dev/shm/holds && exec sleep 1000']
    readinessProbe: {exec: {command: [test, -e, /dev/shm/holds]}, periodSeconds: 2, timeoutSeconds: 20}
    resources: {requests: {cpu: 50m, memory: 16Mi}, limits: {memory: 64Mi}}
  - name: above
    image: ` + images.Busybox + `
    command: [sh, -c, 'tail /dev/zero']
    resources: {requests: {cpu: 50m, memory: 16Mi}, limits: {memory: 96Mi}}
`

func (m *machine) testLimits(t *testing.T) {
	m.apply(t, "full", full)
	p := m.await(t, "one container holds what it may, another is ended for more, and begins again", "full", func(p pod) bool {
		return p.container("below").Ready && p.container("above").LastState.Terminated != nil
	})
	if above := p.container("above").LastState.Terminated; above.ExitCode != 137 || above.Reason != "OOMKilled" {
		t.Errorf("what exceeded its limit: %+v", above)
	}
	if n := p.container("below").RestartCount; n != 0 {
		t.Errorf("what stayed below its limit was restarted %d times", n)
	}
	if text, err := os.ReadFile(filepath.Join(cgroup(p), "memory.events")); err != nil || !strings.Contains(string(text), "oom_kill 0\n") {
		t.Errorf("the node has ended processes of the pod: %v\n%s", err, text)
	}
	m.remove(t, "full")
}

// memTotal is the MiB of memory by what /proc/meminfo says.
func memTotal(meminfo string) int {
	var kib int
	fmt.Sscanf(meminfo, "MemTotal: %d kB", &kib)
	return kib >> 10
}

// cgroup is where the kubelet has a burstable pod.
func cgroup(p pod) string {
	uid := strings.ReplaceAll(p.Metadata.UID, "-", "_")
	return filepath.Join(kubeCgroup, "kubepods-burstable.slice", "kubepods-burstable-pod"+uid+".slice")
}

// vmms are the processes in cgroups below one, but for the kernel's: KVM has threads of its own there.
func vmms(t *testing.T, group string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(group, "*", "cgroup.procs"))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, pid := range strings.Fields(string(text)) {
			if _, err := os.Readlink("/proc/" + pid + "/exe"); err == nil {
				found = append(found, pid)
			}
		}
	}
	return found
}

func (m *machine) testProbes(t *testing.T) {
	if _, err := m.run("pair", "worker", "rm /shared/ready"); err != nil {
		t.Fatal(err)
	}
	m.await(t, "the exec probe fails: not ready", "pair", func(p pod) bool { return !p.container("worker").Ready && !ready(p) })
	if _, err := m.run("pair", "worker", "touch /shared/ready"); err != nil {
		t.Fatal(err)
	}
	p := m.await(t, "the exec probe succeeds: ready again", "pair", ready)
	if n := p.container("worker").RestartCount; n != 0 {
		t.Errorf("a readiness probe has restarted the container %d times", n)
	}
	if _, err := m.run("pair", "web", "mv /shared/index.html /shared/away.html"); err != nil {
		t.Fatal(err)
	}
	m.await(t, "the http probe fails: the container is restarted", "pair", func(p pod) bool { return p.container("web").RestartCount > 0 })
	// It is restarted as often as the probe fails: the file comes back by the other container.
	if _, err := m.run("pair", "worker", "mv /shared/away.html /shared/index.html"); err != nil {
		t.Fatal(err)
	}
	p = m.await(t, "the pod is ready again", "pair", ready)
	if last := p.container("web").LastState.Terminated; last == nil || last.ExitCode == 0 {
		t.Errorf("the end of the container that was not alive: %+v", last)
	}
}

var crash = `apiVersion: v1
kind: Pod
metadata: {name: crash}
spec:
  containers:
  - name: crash
    image: ` + images.Busybox + `
    command: [sh, -c, 'echo attempt; echo out of luck > /dev/termination-log; exit 3']
`

func (m *machine) testCrashLoop(t *testing.T) {
	m.apply(t, "crash", crash)
	m.await(t, "it has crashed twice and waits", "crash", func(p pod) bool {
		c := p.container("crash")
		return c.RestartCount == 1 && c.State.Waiting != nil && c.State.Waiting.Reason == "CrashLoopBackOff"
	})
	p := m.await(t, "it has crashed once more", "crash", func(p pod) bool {
		c := p.container("crash")
		return c.RestartCount == 2 && c.State.Running == nil && c.LastState.Terminated != nil
	})
	end := p.container("crash").LastState.Terminated
	if now := p.container("crash").State.Terminated; now != nil {
		end = now
	}
	if end.ExitCode != 3 || end.Reason != "Error" || end.Message != "out of luck\n" {
		t.Errorf("its end: %+v", *end)
	}
	m.remove(t, "crash")
}

// disk is a pod of two containers that see a directory of the node, and an emptyDir, of which one has a part.
func disk(dir string) string {
	return `apiVersion: v1
kind: Pod
metadata: {name: disk}
spec:
  terminationGracePeriodSeconds: 1
  volumes:
  - {name: host, hostPath: {path: ` + dir + `, type: DirectoryOrCreate}}
  - {name: own, emptyDir: {}}
  containers:
  - name: writer
    image: ` + images.Busybox + `
    command: [sh, -c, 'echo whole > /own/file; exec 3> /host/log; i=0; while :; do i=$((i+1)); echo $i >&3 || exit 1; sleep 0.1; done']
    volumeMounts: [{name: host, mountPath: /host, subPath: part}, {name: own, mountPath: /own, subPath: a/b}]
  - name: reader
    image: ` + images.Busybox + `
    command: [sleep, "1000000"]
    volumeMounts: [{name: host, mountPath: /host, readOnly: true}, {name: own, mountPath: /own}]
`
}

// testVolumes leaves a pod that writes to the node, also while kubelet and daemon are restarted.
func (m *machine) testVolumes(t *testing.T) {
	m.apply(t, "disk", disk(m.shared))
	m.await(t, "a pod with a directory of the node is ready", "disk", ready)
	for command, want := range map[string]string{"cat /own/a/b/file": "whole\n", "head -n 1 /host/part/log": "1\n"} {
		eventually(t, "one container sees what the other writes", func() error {
			if out, err := m.run("disk", "reader", command); err != nil || out != want {
				return fmt.Errorf("%s: %q, %v; want %q", command, out, err, want)
			}
			return nil
		})
	}
	if out, err := m.run("disk", "reader", "touch /host/file"); err == nil {
		t.Errorf("a read-only directory of the node was written: %q", out)
	}
}

// written looks at the file that the pod has written all the time.
func (m *machine) written(t *testing.T) {
	p := m.await(t, "the pod with a directory of the node is ready", "disk", ready)
	if n := p.container("writer").RestartCount; n != 0 {
		t.Errorf("the container that writes to the node was restarted %d times", n)
	}
	text, err := os.ReadFile(filepath.Join(m.shared, "part", "log"))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Fields(string(text))
	for i, line := range lines {
		if line != strconv.Itoa(i+1) {
			t.Fatalf("line %d of %d that it has written is %q", i+1, len(lines), line)
		}
	}
	t.Logf("%d lines on the node, whole and in order", len(lines))
	eventually(t, "it writes on", func() error {
		now, err := os.ReadFile(filepath.Join(m.shared, "part", "log"))
		if err == nil && len(now) <= len(text) {
			err = fmt.Errorf("%d bytes, as before", len(now))
		}
		return err
	})
}

// testKubeletRestart and testDaemonRestart: a restart of the one or the other changes no container.
func (m *machine) testKubeletRestart(t *testing.T) {
	before := m.await(t, "the pod is ready", "pair", ready)
	systemctl(t, "restart", "kubelet.service")
	m.unchanged(t, before)
}

func (m *machine) testDaemonRestart(t *testing.T) {
	before := m.await(t, "the pod is ready", "pair", ready)
	pid := systemctl(t, "show", "--property=MainPID", "--value", "caissond.service")
	systemctl(t, "kill", "--kill-whom=main", "--signal=KILL", "caissond.service")
	eventually(t, "systemd has started the daemon again", func() error {
		if now := systemctl(t, "show", "--property=MainPID", "--value", "caissond.service"); now == pid || now == "0" {
			return fmt.Errorf("its process is %s, was %s", now, pid)
		}
		_, err := tryCrictl("version")
		return err
	})
	m.unchanged(t, before)
}

// unchanged waits until the pod is ready and works, and compares its containers and VMM.
func (m *machine) unchanged(t *testing.T, before pod) {
	t.Helper()
	vmm := vmms(t, cgroup(before))
	p := m.await(t, "the pod is ready after the restart", "pair", ready)
	for _, name := range []string{"first", "web", "worker"} {
		if was, is := before.container(name), p.container(name); was.id() != is.id() || was.RestartCount != is.RestartCount {
			t.Errorf("%s was %s, restarted %d times; now it is %s, %d times", name, was.id(), was.RestartCount, is.id(), is.RestartCount)
		}
	}
	eventually(t, "a command runs in it", func() error {
		out, err := m.run("pair", "worker", "cat /shared/index.html")
		if err == nil && out != "from the first\n" {
			err = fmt.Errorf("it says %q", out)
		}
		return err
	})
	if now := vmms(t, cgroup(p)); strings.Join(now, " ") != strings.Join(vmm, " ") {
		t.Errorf("the VMM was %v, is %v", vmm, now)
	}
	// The exec probe has to go through the daemon: readiness follows it.
	if _, err := m.run("pair", "worker", "rm /shared/ready"); err != nil {
		t.Fatal(err)
	}
	m.await(t, "probes go on: not ready", "pair", func(p pod) bool { return !ready(p) })
	if _, err := m.run("pair", "worker", "touch /shared/ready"); err != nil {
		t.Fatal(err)
	}
	m.await(t, "probes go on: ready", "pair", ready)
}

// testLogs looks at a log through which kubelet and daemon were restarted: no line is missing, none
// is there twice.
func (m *machine) testLogs(t *testing.T) {
	p := m.await(t, "the pod is ready", "pair", ready)
	lines, err := harness.ReadLog(p.logFile("worker"))
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range lines {
		if l.Text != strconv.Itoa(i+1) || l.Stream != "stdout" || l.Partial {
			t.Fatalf("line %d of %d: %+v", i+1, len(lines), l)
		}
	}
	t.Logf("%d lines, whole and in order", len(lines))
	m.written(t)
}

func (m *machine) testDeletion(t *testing.T) {
	m.remove(t, "pair")
	m.remove(t, "disk")
	eventually(t, "no pod is left", func() error {
		var left []string
		for _, list := range [][]string{{"pods", "--quiet"}, {"ps", "--all", "--quiet"}} {
			out, err := tryCrictl(list...)
			if err != nil {
				return err
			}
			left = append(left, strings.Fields(out)...)
		}
		return errors.Join(none(left), noFiles(kubeCgroup+"/*/kubepods-*pod*", kubeCgroup+"/kubepods-pod*", kubeletVar+"/pods/*", podLogs+"/*"))
	})
	systemctl(t, "stop", "caissond.service") // and with it the clone that was ready for the next pod
	err := noFiles(caissonVar+"/pods/*", caissonRun+"/netns/*", "/sys/class/net/veth*", "/sys/fs/cgroup/system.slice/caissond.service/*/")
	if err != nil {
		t.Error(err)
	}
	out, err := processes("cloud-hypervisor", "qemu-system-x86", "caissond-share")
	if err != nil || len(out) > 0 {
		t.Errorf("VMMs, and what serves directories, that are left: %v, %v", out, err)
	}
}

func none(left []string) error {
	if len(left) > 0 {
		return fmt.Errorf("there is %s", strings.Join(left, ", "))
	}
	return nil
}

// noFiles is an error if there are any of these names.
func noFiles(patterns ...string) error {
	var left []string
	for _, pattern := range patterns {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		left = append(left, found...)
	}
	return none(left)
}

// processes are those of the names, as the kernel has them: 15 bytes.
func processes(names ...string) ([]string, error) {
	files, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		for _, name := range names {
			if strings.TrimSpace(string(text)) == name[:min(15, len(name))] {
				found = append(found, file)
			}
		}
	}
	return found, nil
}
