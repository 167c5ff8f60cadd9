package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"github.com/caisson-vm/caisson/podvm/guestimage"
)

// defaultGuest is where an installed guest is, and where the configuration looks for it.
const defaultGuest = "/usr/local/lib/caisson/guest"

// guest builds the kernel and initramfs that pods boot.
func guest(ctx context.Context, args []string) error {
	if len(args) == 0 || args[0] != "build" {
		return usageError{errors.New("guest has one subcommand: build")}
	}
	flags := flag.NewFlagSet("caissond guest build", flag.ContinueOnError)
	output := flags.String("output", defaultGuest, "`folder` to make or replace")
	agent := flags.String("agent", besideSelf("caisson-agent"), "the caisson-agent program, a `file`")
	cache := flags.String("cache", "", "`folder` that keeps downloaded packages (default /var/cache/caisson/packages)")
	kernelPackage := flags.String("kernel-package", "", "Debian kernel `package` (default linux-image-cloud-amd64)")
	kernel := flags.String("kernel", "", "a kernel of one's own, made by 'make guest-kernel', a `file`")
	if err := flags.Parse(args[1:]); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return usageError{err}
	}
	files, err := guestimage.Build(ctx, guestimage.BuildOptions{
		Output: *output, Agent: *agent, Cache: *cache, KernelPackage: *kernelPackage, Kernel: *kernel,
	})
	if err != nil {
		return err
	}
	fmt.Println("guest", files.Version, "in", files.Dir)
	return nil
}

// besideSelf is the path of a program installed beside this one.
func besideSelf(name string) string {
	self, err := os.Executable()
	if err != nil {
		return name
	}
	return filepath.Join(filepath.Dir(self), name)
}
