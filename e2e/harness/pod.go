package harness

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// callLimit is how long one call may take; a VM that boots by emulation on a busy machine is slow.
const callLimit = 2 * time.Minute

// Pod is a pod that a test has run.
type Pod struct {
	ID     string
	Config *runtimeapi.PodSandboxConfig
	d      *Daemon
}

// Container is a container that a test has created.
type Container struct {
	ID     string
	Config *runtimeapi.ContainerConfig
	Pod    *Pod
}

// number makes names unique within a suite.
var number atomic.Int64

// On is the daemon for a subtest: failures are its own.
func (d *Daemon) On(t testing.TB) *Daemon {
	d.dial()
	c := *d
	c.t = t
	return &c
}

// PodConfig is a pod of a fresh name with a folder for logs.
func (d *Daemon) PodConfig(change ...func(*runtimeapi.PodSandboxConfig)) *runtimeapi.PodSandboxConfig {
	d.t.Helper()
	n := number.Add(1)
	c := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{
			Name: fmt.Sprintf("pod-%d", n), Namespace: "e2e", Uid: fmt.Sprintf("00000000-0000-4000-8000-%012d", n),
		},
		LogDirectory: filepath.Join(d.Dir, "logs", fmt.Sprintf("pod-%d", n)),
		Linux:        &runtimeapi.LinuxPodSandboxConfig{},
	}
	if err := os.MkdirAll(c.LogDirectory, 0o755); err != nil {
		d.t.Fatal(err)
	}
	for _, f := range change {
		f(c)
	}
	return c
}

// RunPod runs a pod that goes when the test ends.
func (d *Daemon) RunPod(change ...func(*runtimeapi.PodSandboxConfig)) *Pod {
	d.t.Helper()
	p, err := d.TryRunPod(d.PodConfig(change...))
	if err != nil {
		d.t.Fatalf("run pod: %v", err)
	}
	d.t.Cleanup(p.Remove)
	return p
}

// TryRunPod runs a pod, or returns why it could not.
func (d *Daemon) TryRunPod(c *runtimeapi.PodSandboxConfig) (*Pod, error) {
	ctx, cancel := limit()
	defer cancel()
	r, err := d.Runtime().RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: c})
	if err != nil {
		return nil, err
	}
	return &Pod{ID: r.PodSandboxId, Config: c, d: d}, nil
}

func limit() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), callLimit)
}

// Remove stops and removes the pod and its containers; what is gone already is fine.
func (p *Pod) Remove() {
	p.d.t.Helper()
	ctx, cancel := limit()
	defer cancel()
	if _, err := p.d.Runtime().StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		p.d.t.Errorf("stop pod: %v", err)
	}
	if _, err := p.d.Runtime().RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		p.d.t.Errorf("remove pod: %v", err)
	}
}

// Status is the pod's status.
func (p *Pod) Status() *runtimeapi.PodSandboxStatus {
	p.d.t.Helper()
	ctx, cancel := limit()
	defer cancel()
	r, err := p.d.Runtime().PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.ID})
	if err != nil {
		p.d.t.Fatalf("status of pod: %v", err)
	}
	return r.Status
}

// Pull pulls an image unless it is there, and returns its id.
func (d *Daemon) Pull(ref string) string {
	d.t.Helper()
	id, err := d.TryPull(ref, nil)
	if err != nil {
		d.t.Fatalf("pull %s: %v", ref, err)
	}
	return id
}

// TryPull pulls an image, or returns why it could not.
func (d *Daemon) TryPull(ref string, auth *runtimeapi.AuthConfig) (string, error) {
	ctx, cancel := limit()
	defer cancel()
	r, err := d.ImageService().PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}, Auth: auth})
	if err != nil {
		return "", err
	}
	return r.ImageRef, nil
}

// Create creates a container of the image, pulling it first. It goes with its pod.
func (p *Pod) Create(image string, command []string, change ...func(*runtimeapi.ContainerConfig)) *Container {
	p.d.t.Helper()
	p.d.Pull(image)
	c, err := p.TryCreate(image, command, change...)
	if err != nil {
		p.d.t.Fatalf("create container: %v", err)
	}
	return c
}

// TryCreate creates a container, or returns why it could not.
func (p *Pod) TryCreate(image string, command []string, change ...func(*runtimeapi.ContainerConfig)) (*Container, error) {
	n := number.Add(1)
	config := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: fmt.Sprintf("container-%d", n)},
		Image:    &runtimeapi.ImageSpec{Image: image},
		Command:  command,
		LogPath:  fmt.Sprintf("container-%d.log", n),
		Linux:    &runtimeapi.LinuxContainerConfig{},
	}
	for _, f := range change {
		f(config)
	}
	ctx, cancel := limit()
	defer cancel()
	r, err := p.d.Runtime().CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.ID, Config: config, SandboxConfig: p.Config})
	if err != nil {
		return nil, err
	}
	return &Container{ID: r.ContainerId, Config: config, Pod: p}, nil
}

// Run creates a container and starts it.
func (p *Pod) Run(image string, command []string, change ...func(*runtimeapi.ContainerConfig)) *Container {
	p.d.t.Helper()
	c := p.Create(image, command, change...)
	c.Start()
	return c
}

// Shell is a container's command that has a shell run a script.
func Shell(script string) []string { return []string{"sh", "-c", script} }

// Start starts the container.
func (c *Container) Start() {
	c.t().Helper()
	if err := c.TryStart(); err != nil {
		c.t().Fatalf("start container: %v", err)
	}
}

// TryStart starts the container, or returns why it could not.
func (c *Container) TryStart() error {
	ctx, cancel := limit()
	defer cancel()
	_, err := c.Pod.d.Runtime().StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ID})
	return err
}

func (c *Container) t() testing.TB { return c.Pod.d.t }

// Stop stops the container with a grace period in seconds.
func (c *Container) Stop(grace int64) {
	c.t().Helper()
	ctx, cancel := limit()
	defer cancel()
	if _, err := c.Pod.d.Runtime().StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c.ID, Timeout: grace}); err != nil {
		c.t().Fatalf("stop container: %v", err)
	}
}

// Remove removes the container.
func (c *Container) Remove() {
	c.t().Helper()
	ctx, cancel := limit()
	defer cancel()
	if _, err := c.Pod.d.Runtime().RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.ID}); err != nil {
		c.t().Fatalf("remove container: %v", err)
	}
}

// Status is the container's status.
func (c *Container) Status() *runtimeapi.ContainerStatus {
	c.t().Helper()
	ctx, cancel := limit()
	defer cancel()
	r, err := c.Pod.d.Runtime().ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.ID})
	if err != nil {
		c.t().Fatalf("status of container: %v", err)
	}
	return r.Status
}

// Wait waits until the container has exited and returns its last status.
func (c *Container) Wait() *runtimeapi.ContainerStatus {
	c.t().Helper()
	var s *runtimeapi.ContainerStatus
	Eventually(c.t(), "the container exits", func() error {
		if s = c.Status(); s.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("it is %v", s.State)
		}
		return nil
	})
	return s
}

// Exec runs a command in the container and returns its output. It fails the test unless the
// command exits with 0.
func (c *Container) Exec(command ...string) string {
	c.t().Helper()
	r, err := c.TryExec(60, command...)
	if err != nil {
		c.t().Fatalf("exec %q: %v", command, err)
	}
	if r.ExitCode != 0 {
		c.t().Fatalf("exec %q: exit code %d: %s%s", command, r.ExitCode, r.Stdout, r.Stderr)
	}
	return string(r.Stdout)
}

// TryExec runs a command in the container with a time limit in seconds.
func (c *Container) TryExec(seconds int64, command ...string) (*runtimeapi.ExecSyncResponse, error) {
	ctx, cancel := limit()
	defer cancel()
	return c.Pod.d.Runtime().ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: c.ID, Cmd: command, Timeout: seconds})
}

// LogFile is where the container's log is.
func (c *Container) LogFile() string {
	return filepath.Join(c.Pod.Config.LogDirectory, c.Config.LogPath)
}

// LogLine is one record of a CRI log.
type LogLine struct {
	Time    time.Time
	Stream  string
	Partial bool
	Text    string
}

// ReadLog parses a CRI log file.
func ReadLog(file string) ([]LogLine, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var lines []LogLine
	for text := range strings.Lines(string(data)) {
		part := strings.SplitN(strings.TrimSuffix(text, "\n"), " ", 4)
		if len(part) != 4 || !strings.HasSuffix(text, "\n") {
			return lines, fmt.Errorf("line %d of %s: %.200q is no CRI log record", len(lines)+1, file, text)
		}
		at, err := time.Parse(time.RFC3339Nano, part[0])
		if err != nil || part[1] != "stdout" && part[1] != "stderr" || part[2] != "F" && part[2] != "P" {
			return lines, fmt.Errorf("line %d of %s: %.200q is no CRI log record", len(lines)+1, file, text)
		}
		lines = append(lines, LogLine{at, part[1], part[2] == "P", part[3]})
	}
	return lines, nil
}

// Output is all that the container's log has of a stream, put together again.
func (c *Container) Output(stream string) string {
	c.t().Helper()
	lines, err := ReadLog(c.LogFile())
	if err != nil {
		c.t().Fatal(err)
	}
	var b strings.Builder
	for _, l := range lines {
		if l.Stream != stream {
			continue
		}
		b.WriteString(l.Text)
		if !l.Partial {
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// Eventually waits until a condition holds, for what no event tells of, and fails the test with the
// last reason why it doesn't.
func Eventually(t testing.TB, what string, condition func() error) {
	t.Helper()
	deadline := time.Now().Add(callLimit)
	for {
		err := condition()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v: %v", what, callLimit, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
