package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// How long a daemon may take to come up and to end.
const (
	startLimit = 60 * time.Second
	stopLimit  = 30 * time.Second
)

// Daemon is a caissond process and the place it lives in. It can be ended and started again.
type Daemon struct {
	Config Config
	// Dir is its scratch folder.
	Dir string
	// Registries serve the images of e2e/images to it.
	Registries *Registries

	t       testing.TB
	process *process
	conn    *grpc.ClientConn
	runs    int
}

// process is one run of the daemon.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
	err  error // written before done is closed
}

// Start runs a daemon and waits until it says that it is ready. When the test ends it is stopped,
// what it left is looked for, and its log is shown if the test failed.
func Start(t testing.TB, change ...func(*Config)) *Daemon {
	t.Helper()
	d := New(t, change...)
	before := TakeSnapshot(t)
	if err := d.Start(); err != nil {
		t.Fatalf("start the daemon: %v\n%s", err, d.Log())
	}
	t.Cleanup(func() {
		if d.process == nil {
			return
		}
		d.RemovePods()
		d.Stop()
		if leaks := TakeSnapshot(t).Since(before); len(leaks) > 0 {
			t.Errorf("the daemon left behind:\n  %s", strings.Join(leaks, "\n  "))
		}
		if left := d.Left(); len(left) > 0 {
			t.Errorf("files left in %s:\n  %s", d.Dir, strings.Join(left, "\n  "))
		}
	})
	return d
}

// New prepares a place for a daemon without starting it.
func New(t testing.TB, change ...func(*Config)) *Daemon {
	t.Helper()
	dir := Scratch(t)
	d := &Daemon{t: t, Dir: dir, Config: newConfig(t, dir), Registries: SharedRegistries(t)}
	files := d.Registries.Configure(t, dir)
	d.Config.Images.RegistriesConf, d.Config.Images.Policy = files.RegistriesConf, files.Policy
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", d.Log())
		}
		d.remove()
	})
	for _, f := range change {
		f(&d.Config)
	}
	return d
}

// remove deletes the daemon's folder.
func (d *Daemon) remove() {
	if err := os.RemoveAll(d.Dir); err != nil {
		d.t.Errorf("remove %s: %v", d.Dir, err)
	}
}

// Start runs the daemon, again if it ran before, and waits until it is ready. It fails as soon as
// the process ends.
func (d *Daemon) Start() error {
	d.runs++
	config := d.Config.write(d.t, d.Dir)
	notify, err := listenNotify(filepath.Join(d.Dir, fmt.Sprintf("notify%d", d.runs)))
	if err != nil {
		return err
	}
	defer notify.Close()
	p, err := run(filepath.Join(d.Dir, fmt.Sprintf("log%d", d.runs)), notify.LocalAddr().String(), config)
	if err != nil {
		return err
	}
	ready := make(chan error, 1)
	go func() { ready <- waitReady(notify) }()
	d.process = p
	select {
	case err = <-ready:
	case <-p.done:
		err = fmt.Errorf("the daemon ended: %w", errors.Join(p.err, errors.New(lastLine(p.log))))
	case <-time.After(startLimit):
		err = fmt.Errorf("the daemon was not ready within %v", startLimit)
	}
	if err != nil {
		d.Kill()
		return err
	}
	return nil
}

// run starts caissond with its output in a file.
func run(log, notify, config string) (*process, error) {
	out, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p := &process{log: log, done: make(chan struct{})}
	p.cmd = exec.Command(Bin("caissond"), "serve", "--config", config)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify)
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func listenNotify(path string) (*net.UnixConn, error) {
	return net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
}

// waitReady returns when READY=1 was sent to the socket, or when it is closed.
func waitReady(c *net.UnixConn) error {
	b := make([]byte, 4096)
	for {
		n, err := c.Read(b)
		if err != nil {
			return err
		}
		if bytes.Contains(b[:n], []byte("READY=1")) {
			return nil
		}
	}
}

func lastLine(file string) string {
	data, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return lines[len(lines)-1]
}

// PID is the daemon's process.
func (d *Daemon) PID() int { return d.process.cmd.Process.Pid }

// Stop asks the daemon to end, as systemd does, and waits for it. VMs go on.
func (d *Daemon) Stop() {
	d.t.Helper()
	d.end(unix.SIGTERM)
}

// Kill ends the daemon as a crash does.
func (d *Daemon) Kill() {
	d.t.Helper()
	d.end(unix.SIGKILL)
}

func (d *Daemon) end(s unix.Signal) {
	d.t.Helper()
	if d.conn != nil {
		d.conn.Close()
		d.conn = nil
	}
	p := d.process
	if p == nil {
		return
	}
	d.process = nil
	select {
	case <-p.done: // on its own
		return
	default:
	}
	if err := p.cmd.Process.Signal(s); err != nil {
		d.t.Errorf("signal the daemon: %v", err)
	}
	select {
	case <-p.done:
	case <-time.After(stopLimit):
		d.t.Errorf("the daemon did not end within %v of %v", stopLimit, s)
		_ = p.cmd.Process.Kill()
		<-p.done
	}
	if s == unix.SIGTERM && p.err != nil {
		d.t.Errorf("the daemon ended with %v", p.err)
	}
}

// Restart kills the daemon and starts it again.
func (d *Daemon) Restart() {
	d.t.Helper()
	d.Kill()
	if err := d.Start(); err != nil {
		d.t.Fatalf("start the daemon again: %v\n%s", err, d.Log())
	}
}

// Log is the tail of what the daemon's runs have written.
func (d *Daemon) Log() string {
	const tail = 16 << 10
	var b strings.Builder
	for i := 1; i <= d.runs; i++ {
		data, err := os.ReadFile(filepath.Join(d.Dir, fmt.Sprintf("log%d", i)))
		if err != nil {
			continue
		}
		fmt.Fprintf(&b, "--- run %d\n%s", i, data[max(0, len(data)-tail):])
	}
	return b.String()
}

// Runtime is a client of the daemon's runtime service.
func (d *Daemon) Runtime() runtimeapi.RuntimeServiceClient {
	return runtimeapi.NewRuntimeServiceClient(d.dial())
}

// ImageService is a client of the daemon's image service.
func (d *Daemon) ImageService() runtimeapi.ImageServiceClient {
	return runtimeapi.NewImageServiceClient(d.dial())
}

func (d *Daemon) dial() *grpc.ClientConn {
	if d.conn == nil {
		conn, err := grpc.NewClient("unix://"+d.Config.Listen, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
		if err != nil {
			d.t.Fatal(err)
		}
		d.conn = conn
	}
	return d.conn
}

// RemovePods stops and removes all pods.
func (d *Daemon) RemovePods() {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	list, err := d.Runtime().ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		d.t.Errorf("list pods: %v", err)
		return
	}
	for _, pod := range list.Items {
		if _, err := d.Runtime().StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod.Id}); err != nil {
			d.t.Errorf("stop pod %s: %v", pod.Id, err)
		}
		if _, err := d.Runtime().RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod.Id}); err != nil {
			d.t.Errorf("remove pod %s: %v", pod.Id, err)
		}
	}
}

// Crictl runs crictl against the daemon and returns its standard output. A failure fails the test.
func (d *Daemon) Crictl(args ...string) string {
	d.t.Helper()
	out, err := d.TryCrictl(args...)
	if err != nil {
		d.t.Fatalf("crictl %s: %v", strings.Join(args, " "), err)
	}
	return out
}

// TryCrictl runs crictl against the daemon. The error has what it wrote to standard error.
func (d *Daemon) TryCrictl(args ...string) (string, error) {
	cmd := d.CrictlCommand(context.Background(), args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return string(out), err
}

// CrictlCommand is crictl, ready to be started.
func (d *Daemon) CrictlCommand(ctx context.Context, args ...string) *exec.Cmd {
	endpoint := "unix://" + d.Config.Listen
	flags := []string{"--config", os.DevNull, "--runtime-endpoint", endpoint, "--image-endpoint", endpoint, "--timeout", "120s"}
	return exec.CommandContext(ctx, Tool("crictl"), append(flags, args...)...)
}
