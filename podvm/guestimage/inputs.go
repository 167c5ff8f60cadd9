package guestimage

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// inputs are what an image is made from, but for the packages that crun's depends on.
type inputs struct {
	agent []byte
	crun  deb
	// kernel is the package with the kernel; unused if kernelFile is set.
	kernel     deb
	kernelFile []byte
}

func gather(ctx context.Context, o BuildOptions) (in inputs, err error) {
	if in.agent, err = os.ReadFile(o.Agent); errors.Is(err, fs.ErrNotExist) {
		return in, fmt.Errorf("no agent at %s, run 'make build': %w", o.Agent, errdefs.ErrNotFound)
	} else if err != nil {
		return in, err
	}
	if o.Kernel == "" {
		in.crun, in.kernel, err = packages(ctx, o.KernelPackage)
		return in, err
	}
	crun, err := candidates(ctx, "crun")
	if err != nil {
		return in, err
	}
	in.crun = crun[0]
	if in.kernelFile, err = os.ReadFile(o.Kernel); errors.Is(err, fs.ErrNotExist) {
		return in, fmt.Errorf("no kernel at %s, run 'make guest-kernel': %w", o.Kernel, errdefs.ErrNotFound)
	}
	return in, err
}

func (in inputs) digest() string {
	return digest(recipe, Cmdline, atBoot, machine, onDemand, never,
		sha256.Sum256(in.agent), in.crun, in.kernel, sha256.Sum256(in.kernelFile))
}

// upToDate tells whether the image in dir is whole and was made from the same inputs.
func upToDate(ctx context.Context, dir, inputs string) bool {
	if _, err := Open(dir); err != nil {
		return false
	}
	m, err := readManifest(dir)
	if err != nil || m.Inputs != inputs {
		return false
	}
	debs, err := candidates(ctx, slices.Sorted(maps.Keys(m.Packages))...)
	if err != nil {
		return false
	}
	return !slices.ContainsFunc(debs, func(d deb) bool { return m.Packages[d.name] != d.version })
}

// packages finds crun's package, and the one that has the kernel.
func packages(ctx context.Context, kernelPackage string) (crun, kernel deb, err error) {
	debs, err := candidates(ctx, "crun", kernelPackage)
	if err != nil {
		return crun, kernel, err
	}
	crun, kernel = debs[0], debs[1]
	// A metapackage depends on the kernel's own package, whose name has its release in it.
	i := slices.IndexFunc(kernel.depends, func(d string) bool { return strings.HasPrefix(d, "linux-image-") })
	if i < 0 {
		return crun, kernel, nil
	}
	debs, err = candidates(ctx, kernel.depends[i])
	if err != nil {
		return crun, kernel, err
	}
	return crun, debs[0], nil
}
