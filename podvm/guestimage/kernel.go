package guestimage

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path"
	"regexp"
	"strings"
)

// addKernel takes the kernel from its file, or with its modules from its package.
func (b *builder) addKernel(ctx context.Context, in inputs) error {
	if in.kernelFile == nil {
		slog.Info("build guest", "kernel", in.kernel.name, "version", in.kernel.version)
		b.manifest.Packages[in.kernel.name] = in.kernel.version
		return b.unpackKernel(ctx, in.kernel)
	}
	banner := regexp.MustCompile(`Linux version (\d\S+) \(`).FindSubmatch(in.kernelFile)
	if banner == nil {
		return errors.New("the kernel does not say its version: is it an uncompressed vmlinux?")
	}
	b.manifest.Kernel, b.kernel = string(banner[1]), in.kernelFile
	slog.Info("build guest", "kernel", b.manifest.Kernel)
	return checkPVH(b.kernel)
}

// unpackKernel takes the kernel and its modules from the package.
func (b *builder) unpackKernel(ctx context.Context, kernel deb) error {
	file, err := download(ctx, b.cache, kernel)
	if err != nil {
		return err
	}
	var bzImage []byte
	all := make(modules)
	err = unpack(ctx, file, func(name string, h *tar.Header, r io.Reader) (err error) {
		if h.Typeflag != tar.TypeReg {
			return nil
		}
		if release, ok := strings.CutPrefix(name, "boot/vmlinuz-"); ok {
			b.manifest.Kernel = release
			bzImage, err = io.ReadAll(r)
		}
		if rest, ok := strings.CutPrefix(name, "lib/modules/"); ok && path.Ext(name) == ".ko" {
			_, file, _ := strings.Cut(rest, "/kernel/")
			all[strings.TrimSuffix(file, ".ko")], err = io.ReadAll(r)
		}
		return err
	})
	if err != nil {
		return err
	}
	if b.kernel, err = vmlinux(bzImage); err != nil {
		return fmt.Errorf("kernel of %s: %w", kernel.name, err)
	}
	picked, err := all.pick()
	if err != nil {
		return fmt.Errorf("%s: %w", kernel.name, err)
	}
	if _, ok := picked["virtio_pci"]; !ok {
		return fmt.Errorf("%s has no module virtio_pci among its %d uncompressed ones", kernel.name, len(all))
	}
	return addModules(b.tree, b.manifest.Kernel, picked)
}
