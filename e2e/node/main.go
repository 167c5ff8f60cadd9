// Command node keeps an emulated Kubernetes node: a Debian VM under QEMU's emulation, whose CPU
// offers AMD SVM with nested paging. Inside it /dev/kvm truly works, with cgroup v2 and systemd, so
// that Cloud Hypervisor, a kubelet and other runtimes run for real on a machine without hardware
// virtualization. It is slow: compare ratios, not seconds.
//
//	node build              make its root file system (a minute or two; once)
//	node up                 boot it and wait until it answers
//	node run CMD...         run a command in it; stdin, stdout and the exit status pass through
//	node put FILE... DIR    copy files into it
//	node get FILE... DIR    copy files out of it
//	node suite [ARG...]     run the end-to-end tests in it; the arguments are the test program's
//	node kubelet [ARG...]   run the tests with a kubelet in it, likewise
//	node contract [ARG...]  run the contract of VM drivers with Cloud Hypervisor in it, likewise
//	node log                print its console
//	node down               power it off
//
// It needs root and, from Debian: qemu-system-x86 debootstrap openssh-client e2fsprogs. Clones
// start faster by QEMU 10 than by 7.2.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"time"
)

func main() {
	n := &node{}
	flag.StringVar(&n.dir, "dir", "/var/tmp/caisson-node", "`folder` of its disk and key")
	flag.IntVar(&n.port, "port", 2223, "TCP `port` on the loopback for ssh")
	flag.StringVar(&n.qemu, "qemu", "qemu-system-x86_64", "QEMU `binary`")
	flag.IntVar(&n.memory, "memory", 8192, "memory in `MiB`")
	flag.IntVar(&n.cpus, "cpus", 2, "number of `CPUs`")
	flag.StringVar(&n.diskSize, "disk", "24G", "`size` of its disk (build)")
	flag.StringVar(&n.packages, "packages", "", "further Debian `packages`, separated by commas (build)")
	flag.DurationVar(&n.limit, "limit", 0, "end a command that runs longer (run); an emulated machine can freeze")
	flag.Usage = usage
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := n.do(ctx, flag.Args())
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && flag.Arg(0) == "run":
		os.Exit(exit.ExitCode())
	case err != nil:
		fmt.Fprintln(os.Stderr, "node:", err)
		os.Exit(1)
	}
}

func usage() {
	fmt.Fprintln(os.Stderr, "node [flags] build | up | run CMD... | put FILE... DIR | get FILE... DIR | suite [ARG...] | kubelet [ARG...] | contract [ARG...] | log | down")
	flag.PrintDefaults()
}

type node struct {
	dir, qemu, diskSize, packages string
	port, memory, cpus            int
	limit                         time.Duration
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

func (n *node) do(ctx context.Context, args []string) error {
	if len(args) == 0 {
		usage()
		return errors.New("what to do is missing")
	}
	rest := args[1:]
	switch args[0] {
	case "build":
		return n.build(ctx)
	case "up":
		return n.up(ctx)
	case "run":
		return n.run(ctx, rest)
	case "put":
		return n.copy(ctx, rest, "", remote)
	case "get":
		return n.copy(ctx, rest, remote, "")
	case "suite":
		return n.suite(ctx, endToEnd, rest)
	case "kubelet":
		return n.suite(ctx, kubelet, rest)
	case "contract":
		return n.suite(ctx, contract, rest)
	case "log":
		return n.log()
	case "down":
		return n.down(ctx)
	}
	usage()
	return fmt.Errorf("unknown command %q", args[0])
}

func (n *node) log() error {
	data, err := os.ReadFile(n.path("console.log"))
	if err == nil {
		_, err = os.Stdout.Write(data)
	}
	return err
}
