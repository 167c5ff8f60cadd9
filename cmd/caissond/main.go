// Command caissond is a Kubernetes node's container runtime: it serves the CRI and runs each pod
// in a virtual machine of its own.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"

	"github.com/containers/storage/pkg/reexec"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/imagestore"
	"github.com/caisson-vm/caisson/podvm/share"
)

// version is set by the linker.
var version = "dev"

type command struct {
	name, args, help string
	run              func(ctx context.Context, args []string) error
}

// usageError is a mistake on the command line; it ends the process with status 2.
type usageError struct{ error }

func commands() []command {
	return []command{
		{"serve", "[--config FILE]", "run the daemon", serve},
		{"check", "[--config FILE]", "say what works on this node and how to mend what doesn't", check},
		{"config", "[--config FILE]", "print the effective configuration", printConfig},
		{"guest", "build [--output DIR] [--agent FILE]", "build the guest's kernel and initramfs", guest},
		{"version", "", "print the version", printVersion},
		{name: shareCommand, run: func(context.Context, []string) error { return share.Serve() }},
		{name: pullCommand, run: func(context.Context, []string) error { return imagestore.ServePull() }},
	}
}

// The processes that the daemon starts for a pod with host directories, and for a pull; nobody else does, and so
// they have no help.
const (
	shareCommand = "share"
	pullCommand  = "pull"
)

// The daemon enters mount namespaces of others on threads that end with that; the main thread would not, and
// stay there. So it runs main, and nothing else.
func init() { runtime.LockOSThread() }

func main() {
	if reexec.Init() {
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	err := dispatch(ctx, os.Args[1:])
	var usage usageError
	switch {
	case errors.Is(err, flag.ErrHelp):
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "caissond: %v\n", err)
		os.Exit(2)
	case err != nil:
		fmt.Fprintf(os.Stderr, "caissond: %v\n", err)
		os.Exit(1)
	}
}

func dispatch(ctx context.Context, args []string) error {
	all := commands()
	if len(args) == 0 || args[0] == "help" || args[0] == "--help" || args[0] == "-h" {
		fmt.Println("caissond runs Kubernetes pods in virtual machines.")
		fmt.Println()
		for _, c := range all {
			if c.help == "" {
				continue
			}
			fmt.Printf("  caissond %-46s %s\n", c.name+" "+c.args, c.help)
		}
		return nil
	}
	i := slices.IndexFunc(all, func(c command) bool { return c.name == args[0] })
	if i < 0 {
		return usageError{fmt.Errorf("unknown command %q; 'caissond help' lists them", args[0])}
	}
	return all[i].run(ctx, args[1:])
}

// configFlag parses the arguments of the commands that take --config and nothing else.
func configFlag(name string, args []string) (Config, error) {
	flags := flag.NewFlagSet("caissond "+name, flag.ContinueOnError)
	path := flags.String("config", defaultConfig, "configuration `file`")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return Config{}, err
		}
		return Config{}, usageError{err}
	}
	if flags.NArg() > 0 {
		return Config{}, usageError{fmt.Errorf("%s takes no argument %q", name, flags.Arg(0))}
	}
	return loadConfig(*path)
}

func printConfig(_ context.Context, args []string) error {
	c, err := configFlag("config", args)
	if err != nil {
		return err
	}
	fmt.Print(c)
	return nil
}

func printVersion(context.Context, []string) error {
	fmt.Println("caissond", version)
	return nil
}
