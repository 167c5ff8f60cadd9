// Command demo shows Caisson at work on this machine: the daemon up, a real image pulled from a
// registry, a pod in a virtual machine of its own, and what that is like from outside. It touches
// nothing of the machine: daemon, registry and pod network live in a network namespace of the
// demo's own and in a scratch folder. It exits with 0 only if everything it shows held.
//
//	demo            show, then take everything away
//	demo --keep     leave it running, and print what to try
//	demo --clean    take away what --keep left
//
// Run it as root, from the module's folder, after 'make build guest prepare'.
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
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	// namespace is the demo's network namespace, by its name for ip(8).
	namespace = "caisson-demo"
	// folder holds all that the daemon writes. Unix sockets want a short name.
	folder = "/var/tmp/caisson-demo"
	// insideVar tells the process that it is in the namespace.
	insideVar = "CAISSON_DEMO_INSIDE"
)

func main() {
	keep := flag.Bool("keep", false, "leave the daemon and the pod running")
	clean := flag.Bool("clean", false, "end what --keep left running")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	var err error
	switch {
	case *clean:
		err = cleanUp(ctx)
	case os.Getenv(insideVar) == "":
		err = outside(ctx)
	default:
		err = show(ctx, *keep)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// outside makes the namespace and runs the demo in it.
func outside(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("run it as root: it makes network namespaces and tap devices")
	}
	if _, err := os.Stat(folder); err == nil {
		return fmt.Errorf("%s is there: a demo runs, or was cut off; 'make demo-clean' ends it", folder)
	}
	for _, path := range needed {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("%s is missing: run 'make demo', which makes it", path)
		}
	}
	if err := makeNamespace(); err != nil {
		return err
	}
	if err := os.Mkdir(folder, 0o700); err != nil {
		return err
	}
	// The signal reaches the demo inside as well, which ends in its own time.
	inside := exec.Command("/proc/self/exe", os.Args[1:]...)
	inside.Stdout, inside.Stderr = os.Stdout, os.Stderr
	inside.Env = append(os.Environ(), insideVar+"=1")
	if err := startIn(namespace, inside); err != nil {
		return err
	}
	err := inside.Wait()
	if _, kept := os.Stat(keptPath()); kept == nil && err == nil {
		return nil
	}
	if err != nil {
		err = errors.New("it ended before it was through, see above") // it has said why
	}
	return errors.Join(err, cleanUp(context.WithoutCancel(ctx)))
}

// needed is what the Makefile makes first.
var needed = []string{"bin/caissond", "build/guest/manifest.json", "build/images/index.json", "build/tools/crictl"}

func keptPath() string { return filepath.Join(folder, "kept") }

func makeNamespace() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	if err != nil {
		return err
	}
	defer here.Close()
	made, err := netns.NewNamed(namespace) // and enters it
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", namespace, err)
	}
	defer made.Close()
	defer netns.Set(here)
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
}

// startIn starts a process in a named network namespace: it inherits that of the thread.
func startIn(name string, c *exec.Cmd) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	if err != nil {
		return err
	}
	defer here.Close()
	there, err := netns.GetFromName(name)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	defer there.Close()
	if err := netns.Set(there); err != nil {
		return err
	}
	defer netns.Set(here)
	return c.Start()
}

// cleanUp ends what is left of a demo: pods by the daemon, then the daemon, then the rest.
func cleanUp(ctx context.Context) error {
	var errs []error
	if _, err := os.Stat(socket()); err == nil {
		errs = append(errs, run(ctx, crictl("rmp", "-a", "-f")))
	}
	errs = append(errs, endDaemon(ctx))
	if err := netns.DeleteNamed(namespace); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, fmt.Errorf("network namespace %s: %w", namespace, err))
	}
	return errors.Join(append(errs, os.RemoveAll(folder))...)
}
