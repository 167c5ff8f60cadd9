package guestimage_test

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/internal/serialmux"
	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/guestimage"
)

// buildAgent compiles the agent as the Makefile does.
func buildAgent(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "caisson-agent")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", path, "../../cmd/caisson-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v: %s", err, out)
	}
	return path
}

func build(t *testing.T, output, agent string) guestimage.Files {
	t.Helper()
	files, err := guestimage.Build(t.Context(), guestimage.BuildOptions{Output: output, Agent: agent})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestBuildBoots builds a guest twice, wants the same bytes, and boots it until the agent answers.
func TestBuildBoots(t *testing.T) {
	agentPath := buildAgent(t)
	dir := t.TempDir()
	files := build(t, filepath.Join(dir, "a"), agentPath)
	again := build(t, filepath.Join(dir, "b"), agentPath)
	if files.Version != again.Version {
		t.Errorf("two builds gave the versions %s and %s", files.Version, again.Version)
	}
	before, err := os.Stat(files.Initrd)
	if err != nil {
		t.Fatal(err)
	}
	build(t, files.Dir, agentPath)
	after, err := os.Stat(files.Initrd)
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("a build of what was there replaced it, %v", err)
	}

	start := time.Now()
	conn, console := boot(t, files)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	session, err := serialmux.Dial(ctx, conn, false)
	if err != nil {
		text, _ := os.ReadFile(console)
		t.Fatalf("%v; console: %s", err, text)
	}
	defer session.Close()
	client := agent.NewClient(dialer{session})
	defer client.Close()
	rpc, err := client.RPC(ctx)
	if err != nil {
		t.Fatal(err)
	}
	reply, err := rpc.Setup(ctx, &agent.SetupRequest{
		PodId: strings.Repeat("a", 64), Hostname: "pod", ClockNs: time.Now().UnixNano(),
		Entropy: bytes.Repeat([]byte{7}, 64), MachineId: strings.Repeat("b", 32),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("from QEMU's start to the agent's answer to Setup: %v", time.Since(start))
	m, err := os.ReadFile(filepath.Join(files.Dir, "manifest.json"))
	if err != nil || !strings.Contains(string(m), `"kernel": "`+reply.Kernel+`"`) {
		t.Errorf("the guest runs Linux %s, its manifest says %s, %v", reply.Kernel, m, err)
	}
}

type dialer struct{ session *serialmux.Session }

func (d dialer) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	return d.session.Open(ctx, port)
}

// boot starts a VM with the least it needs, and returns its serial channel and console's file.
func boot(t *testing.T, files guestimage.Files) (net.Conn, string) {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "port"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	console := filepath.Join(dir, "console")
	cmd := exec.Command("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "128M",
		"-nodefaults", "-display", "none", "-no-reboot", "-serial", "file:"+console,
		"-kernel", files.Kernel, "-initrd", files.Initrd, "-append", files.Cmdline+" console=ttyS0",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=port,path="+filepath.Join(dir, "port"),
		"-device", "virtserialport,chardev=port,name=caisson")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, console
}
