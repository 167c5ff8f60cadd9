package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// bootLimit is how long the node may take to answer.
const bootLimit = 4 * time.Minute

const remote = "root@127.0.0.1"

// cpu is what is emulated: all that QEMU can, but for five-level page tables and protection keys. Its
// emulation of nested virtualization is not exact: now and then a guest takes a triple fault or hangs, or
// the node's own kernel dies. Of 40 clones by QEMU 7.2 five were lost with the two, of 122 without them one;
// of some 330 by QEMU 10, without them, two.
const cpu = "max,la57=off,pku=off"

// up boots the node, unless it already answers.
func (n *node) up(ctx context.Context) error {
	if _, err := os.Stat(n.path("disk")); err != nil {
		if err := n.build(ctx); err != nil {
			return err
		}
	}
	if n.ping(ctx) == nil {
		return nil
	}
	if p := n.process(); p != nil {
		return n.waitUp(ctx, nil) // it boots, or is busy
	}
	n.warnOfOld(ctx)
	qemu := exec.Command(n.qemu,
		"-accel", "tcg,thread=multi,tb-size=2047", "-cpu", cpu, "-smp", strconv.Itoa(n.cpus), "-m", strconv.Itoa(n.memory), "-M", "q35",
		"-display", "none", "-monitor", "none", "-no-reboot", "-serial", "file:"+n.path("console.log"), "-pidfile", n.path("pid"),
		"-kernel", n.path("vmlinuz"), "-initrd", n.path("initrd"),
		"-append", "console=ttyS0 root=/dev/vda rw mitigations=off nokaslr audit=0 panic=1 softlockup_panic=1 watchdog_thresh=60 systemd.show_status=0 systemd.unified_cgroup_hierarchy=1",
		"-drive", "file="+n.path("disk")+",if=none,id=root,format=raw,cache=unsafe,discard=unmap", "-device", "virtio-blk-pci,drive=root",
		"-netdev", fmt.Sprintf("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:%d-:22", n.port), "-device", "virtio-net-pci,netdev=net",
		"-device", "virtio-rng-pci",
		"-d", "cpu_reset") // where a processor was, when it ended in a triple fault
	// Why the last one ended may stand there.
	for _, name := range []string{"console", "qemu"} {
		if err := os.Rename(n.path(name+".log"), n.path(name+".last")); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	log, err := os.Create(n.path("qemu.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	qemu.Stdout, qemu.Stderr = log, log
	qemu.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := qemu.Start(); err != nil {
		return fmt.Errorf("start the node: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- qemu.Wait() }()
	return n.waitUp(ctx, ended)
}

// waitUp waits for the node's first answer. ssh itself waits in its connection attempt, so this
// loop is paced by it and by the clock of the retry.
func (n *node) waitUp(ctx context.Context, ended <-chan error) error {
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	for n.ping(ctx) != nil {
		select {
		case err := <-ended:
			return fmt.Errorf("the node's QEMU ended: %v; see %s", err, n.path("qemu.log"))
		case <-ctx.Done():
			return fmt.Errorf("the node did not answer in %v; end of its console:\n%s", bootLimit, n.consoleEnd())
		case <-time.After(time.Second):
		}
	}
	return nil
}

// warnOfOld says so where clones start more slowly than they need: their guests answered after a sixth of a
// boot by QEMU 7.2, after a tenth by QEMU 10.
func (n *node) warnOfOld(ctx context.Context) {
	out, err := exec.CommandContext(ctx, n.qemu, "--version").Output()
	var major int
	if _, scanErr := fmt.Sscanf(string(out), "QEMU emulator version %d.", &major); err == nil && scanErr == nil && major < 10 {
		fmt.Fprintf(os.Stderr, "node: clones start more slowly by QEMU %d than by version 10, with which docs/PERFORMANCE.md was measured; Debian 12 has that in its backports\n", major)
	}
}

// consoleEnd is the end of what the node has written to its console.
func (n *node) consoleEnd() string {
	console, _ := os.ReadFile(n.path("console.log")) // without one there is nothing to show
	return tail(string(console), 2000)
}

func (n *node) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 40*time.Second)
	defer cancel()
	return n.ssh(ctx, "true").Run()
}

func (n *node) sshOptions() []string {
	return []string{"-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
		"-o", "LogLevel=ERROR", "-o", "ConnectTimeout=30", "-o", "ServerAliveInterval=20", "-o", "ServerAliveCountMax=6", "-i", n.path("key")}
}

func (n *node) ssh(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ssh", append(append(n.sshOptions(), "-p", strconv.Itoa(n.port), remote), args...)...)
}

func (n *node) run(ctx context.Context, args []string) error {
	if n.limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, n.limit)
		defer cancel()
	}
	c := n.ssh(ctx, args...)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := c.Run()
	if ctx.Err() != nil {
		return fmt.Errorf("the command ran longer than %v: %w", n.limit, ctx.Err())
	}
	return err
}

// copy runs scp; the remote end is the sources' or the destination's.
func (n *node) copy(ctx context.Context, args []string, from, to string) error {
	if len(args) < 2 {
		return errors.New("want FILE... DIR")
	}
	scp := append([]string{"-q", "-r", "-P", strconv.Itoa(n.port)}, n.sshOptions()...)
	for i, arg := range args {
		host := from
		if i == len(args)-1 {
			host = to
		}
		if host != "" {
			arg = host + ":" + arg
		}
		scp = append(scp, arg)
	}
	return command(ctx, "scp", scp...)
}

// process is the node's QEMU, or nil.
func (n *node) process() *os.Process {
	data, err := os.ReadFile(n.path("pid"))
	if err != nil {
		return nil
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return nil
	}
	command, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !strings.Contains(string(command), n.path("disk")) {
		return nil // the number is another process's now
	}
	p, err := os.FindProcess(pid)
	if err != nil {
		return nil
	}
	return p
}

// down powers the node off and waits for its QEMU to end; one that does not obey is ended.
func (n *node) down(ctx context.Context) error {
	p := n.process()
	if p == nil {
		return nil
	}
	limit, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	n.ssh(limit, "systemctl", "poweroff").Run() // it may be frozen: the signal below helps then
	if ends(p, 40*time.Second) {
		return nil
	}
	if err := p.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	if !ends(p, 20*time.Second) {
		return fmt.Errorf("the node's QEMU, process %d, does not end", p.Pid)
	}
	return nil
}

// ends tells whether a process, which is not our child and so can't be waited for, ends in time.
func ends(p *os.Process, limit time.Duration) bool {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if p.Signal(syscall.Signal(0)) != nil {
			return true
		}
	}
	return false
}
