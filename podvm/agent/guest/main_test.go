package guest

import (
	"context"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/share"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The tests run the agent as it runs in a VM: as the first process, here of namespaces of its own.
// The test's binary is that agent when this names a directory.
const agentDir = "CAISSON_TEST_AGENT"

// testImage is the address of the image that the agent under test has.
const testImage = "serial:image"

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == PauseArg {
		Pause()
	}
	if len(os.Args) == 3 && os.Args[1] == shareArg {
		fmt.Fprintln(os.Stderr, "serve host directories:", share.Serve())
		os.Exit(1)
	}
	if dir := os.Getenv(agentDir); dir != "" {
		fmt.Fprintln(os.Stderr, "agent under test:", serveUnderTest(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func serveUnderTest(dir string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	// crun looks at what is mounted here, also where it is not to use it.
	if err := unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	a, err := New(Options{Version: "test", Root: filepath.Join(dir, "r"), NoCgroups: true})
	if err != nil {
		return err
	}
	k := a.disks.get(testImage)
	k.dir = filepath.Join(dir, "image")
	a.disks.ref(k, true)
	a.disks.release(testImage)
	l, err := net.Listen("unix", filepath.Join(dir, "sock"))
	if err != nil {
		return err
	}
	return a.Serve(context.Background(), l)
}

// dialer dials the agent under test.
type dialer string

func (d dialer) Dial(ctx context.Context, _ uint32) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "unix", string(d))
}

// startAgent runs an agent, set up as a pod, whose image holds busybox.
func startAgent(t *testing.T) (context.Context, *agent.Client) {
	t.Helper()
	ctx, client := bareAgent(t)
	_, err := service1(t, ctx, client).Setup(ctx, setupRequest())
	if err != nil {
		t.Fatal(err)
	}
	return ctx, client
}

func setupRequest() *agent.SetupRequest {
	return &agent.SetupRequest{PodId: "pod", Hostname: "web-1", Dns: &agent.DNS{Servers: []string{"10.0.0.10"}, Searches: []string{"a.svc", "b"}}, Entropy: make([]byte, 32)}
}

// bareAgent runs an agent that has not been set up.
func bareAgent(t *testing.T) (context.Context, *agent.Client) {
	t.Helper()
	ctx, client, _ := dialAgent(t)
	return ctx, client
}

// dialAgent runs an agent that has not been set up, and returns by what it is dialled, too.
func dialAgent(t *testing.T) (context.Context, *agent.Client, agent.Dialer) {
	t.Helper()
	dir, err := os.MkdirTemp("", "cg-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	makeImage(t, filepath.Join(dir, "image"))
	// The agent's files need a file system that an overlay takes as its upper one.
	root := filepath.Join(dir, "r")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(root, unix.MNT_DETACH) })
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), agentDir+"="+dir)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread() // its parent is this thread, with which it would die
		started <- cmd.Start()
		<-ended
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait(); close(ended) })
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	sock := filepath.Join(dir, "sock")
	for {
		if c, err := net.Dial("unix", sock); err == nil {
			c.Close()
			break
		}
		if ctx.Err() != nil || cmd.ProcessState != nil {
			t.Fatal("the agent did not come up")
		}
		time.Sleep(5 * time.Millisecond)
	}
	client := agent.NewClient(dialer(sock))
	t.Cleanup(func() { client.Close() })
	return ctx, client, dialer(sock)
}

func service1(t *testing.T, ctx context.Context, c *agent.Client) agent.AgentClient {
	t.Helper()
	r, err := c.RPC(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// makeImage makes a root file system of busybox.
func makeImage(t *testing.T, dir string) {
	t.Helper()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("%v: run 'apt-get install busybox-static' first", err)
	}
	files := map[string]string{
		"bin/busybox": string(busybox),
		"etc/passwd":  "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001::/home/web:/bin/sh\n",
		"etc/group":   "root:x:0:\nweb:x:1001:\nlog:x:1002:root,web\nwheel:x:1003:web\n",
	}
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), fs.FileMode(0o755)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"proc", "sys", "dev", "tmp", "root"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"sh", "cat", "echo", "sleep", "id", "ls", "stty", "kill", "ps", "hostname", "dd", "head", "true", "touch", "env", "seq", "nc", "stat", "readlink", "wc", "yes", "tail", "mkdir"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
}

func mkfifo(t *testing.T, path string) {
	t.Helper()
	if err := unix.Mkfifo(path, 0o644); err != nil {
		t.Fatal(err)
	}
}
