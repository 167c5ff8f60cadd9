package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// inNode is the folder in the node that is like the module's here.
const inNode = "/caisson"

// program is a package's test program, and the files it needs in the node at the same place as here.
type program struct {
	pkg   string
	files []string
}

var (
	endToEnd = program{"e2e", []string{"go.mod", "bin", "build/guest", "build/images", "build/tools/crictl"}}
	contract = program{"podvm/vmm/cloudhv", []string{"go.mod", "build/guest"}}
	kubelet  = program{"e2e/kubelet", append([]string{"deploy", "build/tools/kubelet"}, endToEnd.files...)}
)

// suite runs a test program in the node, with Cloud Hypervisor on the node's KVM. It is built here
// and copied. Arguments are the test program's, and variables CAISSON_... reach it.
//
// Emulated nested virtualization freezes or panics now and then, for reasons of its own: then the
// node is started anew and the test is repeated. So each test runs by itself, unless the
// arguments choose some.
func (n *node) suite(ctx context.Context, p program, args []string) error {
	vmm, err := exec.LookPath("cloud-hypervisor")
	if err != nil {
		return errors.New("skipped all tests with Cloud Hypervisor: there is no cloud-hypervisor in PATH; put a release of it there")
	}
	name := strings.ReplaceAll(p.pkg, "/", "-") + ".test"
	build := exec.CommandContext(ctx, "go", "test", "-c", "-tags=containers_image_openpgp", "-o", n.path(name), "./"+p.pkg)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the tests: %w\n%s", err, out)
	}
	p.files = append(slices.Clone(p.files), n.path(name), vmm)
	if err := n.prepare(ctx, p); err != nil {
		return err
	}
	tests := []string{""}
	if !slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, "-test.run") }) {
		if tests, err = n.testNames(ctx, p, name); err != nil {
			return err
		}
	}
	var failed []string
	for _, test := range tests {
		run := args
		if test != "" {
			run = append(slices.Clone(args), "-test.run=^"+test+"$")
		}
		var exit *exec.ExitError
		err := n.persist(ctx, p, append([]string{"./" + name}, run...))
		if err != nil && (ctx.Err() != nil || !errors.As(err, &exit)) {
			return err
		}
		if err != nil {
			failed = append(failed, strings.TrimSpace(test+" ("+err.Error()+")"))
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("of %d tests of ./%s failed: %s", len(tests), p.pkg, strings.Join(failed, ", "))
	}
	return nil
}

// testNames are the tests of a program, which tells them itself.
func (n *node) testNames(ctx context.Context, p program, name string) ([]string, error) {
	out, err := n.ssh(ctx, "cd "+path.Join(inNode, p.pkg)+" && ./"+name+" -test.list .").Output()
	if err != nil {
		return nil, fmt.Errorf("list the tests of ./%s: %w: %s", p.pkg, err, out)
	}
	return slices.DeleteFunc(strings.Fields(string(out)), func(word string) bool { return !strings.HasPrefix(word, "Test") }), nil
}

// attempts is how often a test is run when the node freezes under it.
const attempts = 3

// sshFailed is the status with which ssh ends when the node is what failed, and not the command.
const sshFailed = 255

// persist runs a command of the suite, and again in a fresh node when the node has frozen.
func (n *node) persist(ctx context.Context, p program, command []string) error {
	for i := 1; ; i++ {
		err := n.inside(ctx, p, command)
		var exit *exec.ExitError
		frozen := errors.Is(err, context.DeadlineExceeded) || errors.As(err, &exit) && exit.ExitCode() == sshFailed
		if !frozen || ctx.Err() != nil || i == attempts {
			return err
		}
		fmt.Fprintf(os.Stderr, "node: it does not answer any more (%v): starting it anew, attempt %d of %d; its console ends:\n%s\n", err, i+1, attempts, n.consoleEnd())
		if err := errors.Join(n.down(ctx), n.prepare(ctx, p)); err != nil {
			return err
		}
	}
}

// testLimit bounds one test program's run.
const testLimit = 30 * time.Minute

func (n *node) inside(ctx context.Context, p program, command []string) error {
	limit := *n
	if limit.limit == 0 {
		limit.limit = testLimit
	}
	words := []string{"cd", path.Join(inNode, p.pkg), "&&", driverVar + "=cloud-hypervisor"}
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, "CAISSON_") && !strings.HasPrefix(v, driverVar) {
			name, value, _ := strings.Cut(v, "=")
			words = append(words, name+"="+quoted(value))
		}
	}
	for _, word := range command {
		words = append(words, quoted(word))
	}
	return limit.run(ctx, words)
}

// driverVar chooses the driver of the daemons under test.
const driverVar = "CAISSON_E2E_DRIVER"

// quoted is a word as the node's shell reads it.
func quoted(word string) string { return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'" }

// upClean boots the node where it is down, and anew where it is frozen or an interrupted run has left
// VMs in it.
func (n *node) upClean(ctx context.Context) error {
	if err := n.up(ctx); err != nil && n.process() == nil {
		return err
	}
	if n.ping(ctx) == nil && n.ssh(ctx, "pgrep -x 'cloud-hyperviso|caissond'").Run() != nil {
		return nil
	}
	return errors.Join(n.down(ctx), n.up(ctx))
}

// prepare boots the node where it is down, takes away what an interrupted run has left, and copies
// the program and its files.
func (n *node) prepare(ctx context.Context, p program) error {
	if err := n.upClean(ctx); err != nil {
		return err
	}
	to := map[string][]string{}
	for _, file := range p.files {
		switch {
		case filepath.Dir(file) == n.dir:
			to[path.Join(inNode, p.pkg)] = append(to[path.Join(inNode, p.pkg)], file)
		case filepath.IsAbs(file):
			to["/usr/local/bin"] = append(to["/usr/local/bin"], file)
		default:
			dir := path.Join(inNode, path.Dir(file))
			to[dir] = append(to[dir], file)
		}
	}
	script := "systemctl -q stop kubelet caissond 2>/dev/null; rm -rf " + inNode +
		" /etc/caisson /var/lib/caisson /var/lib/kubelet /usr/local/bin/caissond; mkdir -p"
	for dir := range to {
		script += " " + dir
	}
	if err := n.ssh(ctx, script).Run(); err != nil {
		return fmt.Errorf("prepare %s in the node: %w", inNode, err)
	}
	for dir, files := range to {
		if err := n.copy(ctx, append(files, dir), "", remote); err != nil {
			return err
		}
	}
	return n.ssh(ctx, "sync").Run() // a node that panics later must not have lost half of it
}
