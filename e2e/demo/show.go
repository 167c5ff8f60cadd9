package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/e2e/images"
)

// show is the demo itself.
func show(ctx context.Context, keep bool) error {
	began := time.Now()
	say("starting a registry with real images, and caissond")
	r, err := startRegistry(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	config, err := writeConfig(r)
	if err != nil {
		return err
	}
	if err := startDaemon(ctx, config); err != nil {
		return err
	}
	p := &pod{}
	for _, step := range []func(context.Context) error{p.driver, p.pull, p.run, p.kernels, p.web, p.exec, p.logs, p.phases} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	say("all of it held, in %.0f s", time.Since(began).Seconds())
	if !keep {
		say("taking it all away")
		return nil
	}
	tool, err := writeCrictl()
	if err != nil {
		return err
	}
	fmt.Printf(`
It keeps running. Try, as root:
  %[1]s pods
  %[1]s ps
  %[1]s exec -it %[2]s sh
  %[1]s stats
  ip netns exec %[3]s curl http://%[4]s/
  tail -f %[5]s
and end it with: make demo-clean
`, tool, p.container[:13], namespace, p.ip, logPath())
	return os.WriteFile(keptPath(), nil, 0o644)
}

func say(format string, args ...any) { fmt.Printf("\n== "+format+"\n", args...) }

// crictl is a call of crictl for the demo's daemon.
func crictl(args ...string) *exec.Cmd {
	tool, err := filepath.Abs("build/tools/crictl")
	if err != nil {
		tool = "build/tools/crictl"
	}
	address := "unix://" + socket()
	return exec.Command(tool, append([]string{"-c", "/dev/null", "-r", address, "-i", address, "-t", "3m"}, args...)...)
}

// writeCrictl writes a crictl for who stands outside of the demo's namespace, where the streams of
// exec and attach are served, and returns its path.
func writeCrictl() (string, error) {
	path := filepath.Join(folder, "crictl")
	var words []string
	for _, word := range crictl().Args {
		words = append(words, "'"+strings.ReplaceAll(word, "'", `'\''`)+"'")
	}
	script := fmt.Sprintf("#!/bin/sh\nexec ip netns exec %s %s \"$@\"\n", namespace, strings.Join(words, " "))
	return path, os.WriteFile(path, []byte(script), 0o755)
}

// run runs a command and shows what it prints.
func run(ctx context.Context, c *exec.Cmd) error {
	_, err := output(ctx, c, os.Stdout)
	return err
}

// output runs a command and returns what it prints.
func output(ctx context.Context, c *exec.Cmd, to io.Writer) (string, error) {
	var out, problems bytes.Buffer
	c.Stdout, c.Stderr = io.MultiWriter(&out, to), &problems
	if err := c.Start(); err != nil {
		return "", err
	}
	defer context.AfterFunc(ctx, func() { c.Process.Kill() })()
	if err := c.Wait(); err != nil {
		return "", fmt.Errorf("crictl %s: %w\n%s", c.Args[len(c.Args)-1], err, problems.String())
	}
	return strings.TrimSpace(out.String()), nil
}

// pod is the one that is shown.
type pod struct {
	id, container, ip string
}

func (p *pod) driver(ctx context.Context) error {
	text, err := os.ReadFile(logPath())
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "msg=driver ") {
			say("the virtual machine monitor of this node")
			fmt.Print(line)
		}
	}
	return nil
}

func (p *pod) pull(ctx context.Context) error {
	say("pulling an image: its layers become one read-only EROFS file")
	if err := run(ctx, crictl("pull", images.Nginx)); err != nil {
		return err
	}
	return run(ctx, crictl("images"))
}

func (p *pod) run(ctx context.Context) error {
	say("running a pod: a VM with a kernel of its own, cloned from a booted template")
	logs := filepath.Join(folder, "logs")
	sandbox := fmt.Sprintf(`{"metadata": {"name": "web", "namespace": "demo", "uid": "demo-web"}, "log_directory": %q, "linux": {}}`, logs)
	container := fmt.Sprintf(`{"metadata": {"name": "nginx"}, "image": {"image": %q}, "log_path": "nginx.log", "linux": {},
		"command": ["sh", "-c", "echo a line from the container; exec nginx -g 'daemon off;'"]}`, images.Nginx)
	sandboxPath, containerPath := filepath.Join(folder, "pod.json"), filepath.Join(folder, "container.json")
	if err := errors.Join(os.WriteFile(sandboxPath, []byte(sandbox), 0o644), os.WriteFile(containerPath, []byte(container), 0o644)); err != nil {
		return err
	}
	var err error
	if p.id, err = output(ctx, crictl("runp", sandboxPath), io.Discard); err != nil {
		return err
	}
	if p.container, err = output(ctx, crictl("create", p.id, containerPath, sandboxPath), io.Discard); err != nil {
		return err
	}
	if err := run(ctx, crictl("start", p.container)); err != nil {
		return err
	}
	if err := run(ctx, crictl("pods")); err != nil {
		return err
	}
	return run(ctx, crictl("ps"))
}

// kernels shows that the container's kernel is not the node's.
func (p *pod) kernels(ctx context.Context) error {
	say("two kernels")
	guest, err := output(ctx, crictl("exec", p.container, "uname", "-r"), io.Discard)
	if err != nil {
		return err
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	host := unix.ByteSliceToString(u.Release[:])
	fmt.Printf("node: %s\npod:  %s\n", host, guest)
	if guest == host {
		return errors.New("the pod shows the node's kernel: it is in no VM")
	}
	return nil
}

// webLimit is how long the web server may take to listen after its start.
const webLimit = 30 * time.Second

func (p *pod) web(ctx context.Context) error {
	text, err := output(ctx, crictl("inspectp", "-o", "go-template", "--template", "{{.status.network.ip}}", p.id), io.Discard)
	if err != nil {
		return err
	}
	p.ip = strings.TrimSpace(text)
	say("the pod's address, %s, answered by its web server", p.ip)
	ctx, cancel := context.WithTimeout(ctx, webLimit)
	defer cancel()
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(p.ip, "80")+"/", nil)
		if err != nil {
			return err
		}
		response, err := http.DefaultClient.Do(request)
		if err == nil {
			body, err := io.ReadAll(io.LimitReader(response.Body, 400))
			response.Body.Close()
			fmt.Printf("%s, %s\n%s\n", response.Status, response.Header.Get("Server"), strings.TrimSpace(string(body)))
			if response.StatusCode != http.StatusOK {
				return fmt.Errorf("the web server answered %s", response.Status)
			}
			return err
		}
		select {
		case <-time.After(100 * time.Millisecond): // it has started and does not listen yet
		case <-ctx.Done():
			return fmt.Errorf("the web server does not answer: %w", err)
		}
	}
}

func (p *pod) exec(ctx context.Context) error {
	say("a command in the container")
	text, err := output(ctx, crictl("exec", p.container, "sh", "-c", "hostname; echo processes: $(ls -d /proc/[0-9]* | wc -l); df -h / | tail -1"), os.Stdout)
	if err == nil && !strings.Contains(text, "processes:") {
		err = fmt.Errorf("the command printed %q", text)
	}
	return err
}

func (p *pod) logs(ctx context.Context) error {
	say("the container's log")
	text, err := output(ctx, crictl("logs", p.container), os.Stdout)
	if err == nil && !strings.Contains(text, "a line from the container") {
		err = fmt.Errorf("the log is %q", text)
	}
	return err
}

// phases shows where the time of the pod's start went.
func (p *pod) phases(ctx context.Context) error {
	say("the phases of the pod's start (ms; they overlap; a first one waits until its template has booted)")
	text, err := output(ctx, crictl("inspectp", p.id), io.Discard)
	if err != nil {
		return err
	}
	var status struct {
		Info struct {
			Phases []struct {
				Name  string  `json:"name"`
				Start float64 `json:"start_ms"`
				Took  float64 `json:"ms"`
			} `json:"phases"`
		} `json:"info"`
	}
	if err := json.Unmarshal([]byte(text), &status); err != nil {
		return err
	}
	if len(status.Info.Phases) == 0 {
		return errors.New("crictl inspectp shows no phases")
	}
	for _, ph := range status.Info.Phases {
		fmt.Printf("%10s  at %7.1f  took %7.1f\n", ph.Name, ph.Start, ph.Took)
	}
	return nil
}
