// Package harness runs the daemon for end-to-end tests, as its users do: as a process, with a
// configuration file, spoken to through its CRI socket.
//
// A test binary that calls Main from its TestMain runs in PID, mount, network and IPC namespaces
// of its own. Whatever the daemon does there (bridges, iptables rules, mounts, VMs that outlive it)
// reaches nothing else on the machine and is gone with the test, however it ends. What should have
// been cleaned up before that, and was not, fails the test: see Snapshot.
package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// stage tells a process of the suite what it is: nothing for what go test started, then init, then
// the one that runs tests. scratch is the suite's folder, the same for all.
const (
	stageVar   = "CAISSON_E2E_STAGE"
	scratchVar = "CAISSON_E2E_SCRATCH"
)

// Main runs a package's tests in namespaces of their own and ends the process.
func Main(m *testing.M) { os.Exit(Isolate(ready, m.Run)) }

// Isolate runs a function in namespaces of this program's own, once ready has found nothing missing, and
// returns its exit code. The program is started again for that, twice, with the same arguments.
func Isolate(ready func() error, run func() int) int {
	switch os.Getenv(stageVar) {
	case "":
		return outside(ready)
	case "init":
		return reap()
	default:
		os.Unsetenv(stageVar) // a program that it starts may do the same
		return run()
	}
}

// outside checks what is needed, makes the scratch folder and starts init in new namespaces.
func outside(ready func() error) int {
	if err := ready(); err != nil {
		fmt.Fprintf(os.Stderr, "e2e: %v\n", err)
		return 1
	}
	scratch, err := os.MkdirTemp("", "caisson-e2e-")
	if err != nil {
		fmt.Fprintf(os.Stderr, "e2e: %v\n", err)
		return 1
	}
	defer os.RemoveAll(scratch)
	return follow(again("init", scratch, unix.CLONE_NEWNS|unix.CLONE_NEWPID|unix.CLONE_NEWNET|unix.CLONE_NEWIPC))
}

// again is this program once more, at another stage.
func again(stage, scratch string, namespaces uintptr) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), stageVar+"="+stage, scratchVar+"="+scratch, "TMPDIR="+filepath.Join(scratch, "tmp"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Pdeathsig: unix.SIGKILL}
	return cmd
}

// passed are the signals that a stage hands to the next: what go test or an operator sends.
var passed = []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGQUIT}

// follow runs a stage and returns its exit code.
func follow(cmd *exec.Cmd) int {
	// The parent-death signal is tied to the thread that starts the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, passed...)
	if err := cmd.Start(); err != nil {
		fmt.Fprintf(os.Stderr, "e2e: start in new namespaces: %v; run as root\n", err)
		return 1
	}
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s)
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() >= 0 {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "e2e: %v\n", err)
		return 1
	}
	return 0
}

// reap is the init of the namespaces: it sets them up, runs the tests and buries all processes
// whose parents have died, as a machine's init does.
func reap() int {
	runtime.LockOSThread()
	scratch := os.Getenv(scratchVar)
	if err := furnish(scratch); err != nil {
		fmt.Fprintf(os.Stderr, "e2e: set up namespaces: %v\n", err)
		return 1
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, passed...)
	cmd := again("test", scratch, 0)
	if err := cmd.Start(); err != nil {
		fmt.Fprintf(os.Stderr, "e2e: %v\n", err)
		return 1
	}
	tests := cmd.Process.Pid
	go func() {
		for s := range signals {
			_ = unix.Kill(tests, s.(syscall.Signal))
		}
	}()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			fmt.Fprintf(os.Stderr, "e2e: wait: %v\n", err)
			return 1
		case pid == tests && status.Exited():
			return status.ExitStatus()
		case pid == tests && status.Signaled():
			fmt.Fprintf(os.Stderr, "e2e: the tests ended by %v\n", status.Signal())
			return 1
		}
	}
}

// furnish gives the namespaces what a machine has: /proc, a loopback, an empty /run and a folder
// for temporary files, of all users.
func furnish(scratch string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	tmp := filepath.Join(scratch, "tmp")
	if err := errors.Join(os.MkdirAll(tmp, 0o700), os.Chmod(scratch, 0o711), os.Chmod(tmp, 0o777|os.ModeSticky)); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("loopback up: %w", err)
	}
	return nil
}

// ready says what is missing for end-to-end tests, and how to get it.
func ready() error {
	if os.Getuid() != 0 {
		return errors.New("namespaces and taps need root: run as root")
	}
	for _, need := range []struct{ path, hint string }{
		{Bin("caissond"), "run make build first"},
		{Guest(), "run make guest first"},
		{Images(), "run go run ./e2e/prepare first"},
		{Tool("crictl"), "run go run ./e2e/prepare first"},
	} {
		if _, err := os.Stat(need.path); err != nil {
			return fmt.Errorf("%w: %s", err, need.hint)
		}
	}
	return nil
}

// Top is the module's folder: the nearest one above with a go.mod.
var Top = sync.OnceValue(func() string {
	dir, err := os.Getwd()
	for err == nil && dir != "/" {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	return "/"
})

// Bin is one of Caisson's programs; Tool one of the CRI's tools; Guest the guest's folder; Images
// the layout with the images.
func Bin(name string) string  { return filepath.Join(Top(), "bin", name) }
func Tool(name string) string { return filepath.Join(Top(), "build", "tools", name) }
func Guest() string           { return filepath.Join(Top(), "build", "guest") }
func Images() string          { return filepath.Join(Top(), "build", "images") }

// Scratch makes a folder for one use in the suite's own; its path is short enough for sockets.
func Scratch(t testing.TB) string {
	t.Helper()
	base := os.Getenv(scratchVar)
	for i := 0; ; i++ {
		dir := filepath.Join(base, strconv.Itoa(i))
		err := os.Mkdir(dir, 0o755)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return dir
	}
}
