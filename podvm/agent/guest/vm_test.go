package guest

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/qemu"
	"github.com/opencontainers/runtime-spec/specs-go"
)

const mib = 1 << 20

// machine is a real VM with a pod in it.
type machine struct {
	vmm.VM
	t      *testing.T
	ctx    context.Context
	c      *agent.Client
	image  string
	kernel string
}

// startVM boots a guest by emulation and sets it up with an image of busybox and a scratch disk.
func startVM(t *testing.T) *machine {
	t.Helper()
	guest, err := guestimage.Open("../../../build/guest")
	if err != nil {
		t.Fatalf("%v: run 'make guest' first", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	d, err := qemu.New(ctx, "qemu-system-x86_64", qemu.TCG)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "cg-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	run := filepath.Join(dir, "vm")
	if err := os.Mkdir(run, 0o700); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	// Emulated on a busy machine the TSC is not what the kernel measures it to be.
	v, err := d.Launch(ctx, vmm.Config{ID: "test", Dir: run, Kernel: guest.Kernel, Initrd: guest.Initrd,
		Cmdline: guest.Cmdline + " tsc=unstable", Size: vmm.Size{CPUs: 1, Memory: 512 * mib}, Max: vmm.Size{CPUs: 2, Memory: 2048 * mib}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Kill(context.Background()); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			logs, _ := filepath.Glob(filepath.Join(run, "*console*"))
			for _, log := range logs {
				b, _ := os.ReadFile(log)
				t.Logf("%s:\n%s", log, b)
			}
		}
	})
	m := &machine{VM: v, t: t, ctx: ctx, c: agent.NewClient(v)}
	t.Cleanup(func() { m.c.Close() })
	m.setup(dir)
	t.Logf("boot to setup: %v", time.Since(begin))
	return m
}

func (m *machine) setup(dir string) {
	m.t.Helper()
	makeImage(m.t, filepath.Join(dir, "image"))
	m.image = m.disk(filepath.Join(dir, "image.erofs"), "image", true, "mkfs.erofs", filepath.Join(dir, "image.erofs"), filepath.Join(dir, "image"))
	scratch := filepath.Join(dir, "scratch")
	if err := os.WriteFile(scratch, nil, 0o600); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Truncate(scratch, 1024*mib); err != nil {
		m.t.Fatal(err)
	}
	addr := m.disk(scratch, "scratch", false, "mkfs.ext4", "-q", "-F", "-O", "^has_journal,quota,project", "-E", "quotatype=prjquota", scratch)
	resp, err := service1(m.t, m.ctx, m.c).Setup(m.ctx, &agent.SetupRequest{
		PodId: "pod", Hostname: "web-1", ClockNs: time.Now().UnixNano(), Entropy: make([]byte, 32), MachineId: "0123456789abcdef0123456789abcdef",
		Dns: &agent.DNS{Servers: []string{"10.0.0.10"}}, Network: &agent.NetworkRequest{Sysctls: map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}}, ScratchAddr: addr,
	})
	if err != nil {
		m.t.Fatal(err)
	}
	m.kernel = resp.Kernel
}

// disk makes a disk by a command and plugs it in.
func (m *machine) disk(path, serial string, readonly bool, command ...string) string {
	m.t.Helper()
	if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
		m.t.Fatalf("%v: %v: %s", command, err, out)
	}
	addr, err := m.AddDisk(m.ctx, vmm.Disk{Serial: serial, Path: path, ReadOnly: readonly})
	if err != nil {
		m.t.Fatal(err)
	}
	return addr
}

// container makes and starts a container of busybox.
func (m *machine) container(id string, spec *specs.Spec, req *agent.CreateRequest) *run {
	m.t.Helper()
	req.Rootfs = &agent.Rootfs{ImageAddr: m.image}
	begin := time.Now()
	r, _ := create(m.t, m.ctx, m.c, id, spec, req)
	created := time.Now()
	r.start()
	m.t.Logf("container %s: create %v, start %v", id, created.Sub(begin), time.Since(created))
	return r
}

func vmSpec(args ...string) *specs.Spec {
	s := specOf(args...)
	s.Linux = &specs.Linux{
		Namespaces:    []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}},
		MaskedPaths:   []string{"/proc/kcore", "/proc/keys", "/sys/firmware"},
		ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
	}
	return s
}

func TestVM(t *testing.T) {
	m := startVM(t)
	t.Run("life", func(t *testing.T) { m.t = t; m.life(t) })
	t.Run("oom", func(t *testing.T) { m.t = t; m.oom(t) })
	t.Run("stats", func(t *testing.T) { m.t = t; m.stats(t) })
	t.Run("throughput", func(t *testing.T) { m.t = t; m.throughput(t) })
	t.Run("pid", func(t *testing.T) { m.t = t; m.pid(t) })
	t.Run("clock", func(t *testing.T) { m.t = t; m.clock(t) })
	t.Run("hostile", func(t *testing.T) { m.t = t; m.hostile(t) })
}

func (m *machine) life(t *testing.T) {
	r := m.container("life", vmSpec("sh", "-c", "echo hello; hostname; cat /etc/resolv.conf; cat /proc/sys/kernel/random/boot_id; cat /proc/self/cgroup; sleep 1000"), &agent.CreateRequest{})
	for _, args := range [][]string{{"true"}, {"true"}, {"true"}, {"true"}, {"true"}} {
		begin := time.Now()
		if code, _, _ := r.exec(nil, args...); code != 0 {
			t.Errorf("code %d", code)
		}
		t.Logf("exec: %v", time.Since(begin))
	}
	code, out, errs := r.exec(nil, "sh", "-c", "id; ls -l /dev/shm /sys/fs/cgroup; touch /x; exit 4")
	t.Logf("%d %s %s", code, out, errs)
	if code != 4 {
		t.Errorf("code %d", code)
	}
	if _, err := service1(t, m.ctx, m.c).Signal(m.ctx, &agent.SignalRequest{Id: "life", Signal: 9, All: true}); err != nil {
		t.Fatal(err)
	}
	s := r.wait()
	out, errs = r.logs()
	t.Log(out, errs)
	if s.ExitCode != 137 || s.OomKilled {
		t.Errorf("got %v", s)
	}
	begin := time.Now()
	r.remove()
	t.Logf("remove: %v", time.Since(begin))
}

// clock sets the guest's clock forward and back.
func (m *machine) clock(t *testing.T) {
	ask := func(add time.Duration) time.Duration {
		began := time.Now()
		r, err := service1(t, m.ctx, m.c).Clock(m.ctx, &agent.ClockRequest{AddNs: int64(add)})
		if err != nil {
			t.Fatalf("add %v: %v", add, err)
		}
		return time.Duration(r.ClockNs - began.UnixNano())
	}
	const most = 10 * time.Second
	for _, add := range []time.Duration{0, 2 * time.Hour, -2*time.Hour - time.Nanosecond} {
		before := ask(0)
		if gained := ask(add) - before; (gained - add).Abs() > most {
			t.Errorf("the clock gained %v, want %v", gained, add)
		}
	}
	ask(time.Millisecond)
}

func (m *machine) oom(t *testing.T) {
	limit := int64(32 * mib)
	spec := vmSpec("sh", "-c", "dd if=/dev/zero of=/dev/null bs=100M count=1; echo code $?; exit 5")
	spec.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit, Swap: &limit}}
	r := m.container("oom", spec, &agent.CreateRequest{})
	s := r.wait()
	out, errs := r.logs()
	t.Log(s, out, errs)
	if !s.OomKilled {
		t.Errorf("no OOM in %v", s)
	}
	r.remove()
}

func (m *machine) stats(t *testing.T) {
	r := m.container("busy", vmSpec("sh", "-c", "dd if=/dev/zero of=/file bs=1M count=8; exec 3>/gone; rm /gone; dd if=/dev/zero bs=1M count=4 >&3; echo ready; while :; do :; done"), &agent.CreateRequest{})
	o, err := m.c.Output(m.ctx, "busy", 0)
	if err != nil {
		t.Fatal(err)
	}
	for {
		rec, err := o.Next()
		if err != nil {
			t.Fatal(err)
		}
		if string(rec.Line) == "ready" {
			break
		}
	}
	o.Close()
	resources, err := json.Marshal(specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(64 * mib))}, CPU: &specs.LinuxCPU{Shares: ptr(uint64(512))}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := service1(t, m.ctx, m.c).Update(m.ctx, &agent.UpdateRequest{Id: "busy", Resources: resources}); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	s, err := service1(t, m.ctx, m.c).Stats(m.ctx, &agent.StatsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("stats: %v: %v", time.Since(begin), s)
	c := s.Containers[0]
	// One of its files has no name any more: only the kernel knows what that takes.
	if c.LayerBytes < 12*mib || c.LayerBytes > 14*mib || c.Cgroup.MemoryLimit != 64*mib || c.Cgroup.CpuUsageNs == 0 || s.Pod.CpuUsageNs == 0 || c.Cgroup.Pids == 0 {
		t.Errorf("container: %v", c)
	}
	if g := c.Cgroup; g.CpuUserNs+g.CpuSystemNs == 0 || g.MemoryCache < 8*mib || g.MemoryKernel == 0 || g.Throttling == nil || g.OomKills != 0 {
		t.Errorf("cgroup: %v", g)
	}
	if s.MemoryTotal == 0 {
		t.Error("no memory of the guest's")
	}
	r.remove()
}

func ptr[T any](v T) *T { return &v }

func (m *machine) throughput(t *testing.T) {
	r := m.container("loud", vmSpec("sh", "-c", "yes 0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789 | head -n 200000"), &agent.CreateRequest{})
	begin := time.Now()
	out, _ := r.logs()
	took := time.Since(begin)
	if len(out) != 200000*101 {
		t.Errorf("got %d bytes", len(out))
	}
	t.Logf("logs: %d lines, %.1f MB/s", 200000, float64(len(out))/took.Seconds()/1e6)
	r.remove()
	r = m.container("exec", vmSpec("sleep", "1000"), &agent.CreateRequest{})
	begin = time.Now()
	_, out, _ = r.exec(nil, "dd", "if=/dev/zero", "bs=64k", "count=512")
	t.Logf("exec output: %.1f MB/s", float64(len(out))/time.Since(begin).Seconds()/1e6)
	r.remove()
}

func (m *machine) pid(t *testing.T) {
	a := m.container("pid-a", vmSpec("sleep", "1001"), &agent.CreateRequest{SharePid: true})
	b := m.container("pid-b", vmSpec("sleep", "1002"), &agent.CreateRequest{SharePid: true})
	c := m.container("pid-c", vmSpec("sleep", "1003"), &agent.CreateRequest{})
	d := m.container("pid-d", vmSpec("sleep", "1004"), &agent.CreateRequest{TargetPid: "pid-c"})
	for _, r := range []*run{a, b, c, d} {
		_, out, _ := r.exec(nil, "ps")
		t.Logf("%s:\n%s", r.id, out)
	}
	for _, r := range []*run{a, b, d, c} {
		r.remove()
	}
}
