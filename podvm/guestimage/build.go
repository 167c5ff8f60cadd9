package guestimage

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/internal/atomicfile"
	"github.com/containerd/errdefs"
)

// recipe changes whenever the same inputs are to give another image.
const recipe = 5

// BuildOptions says what to build a guest from.
type BuildOptions struct {
	// Output is the folder to make or replace; nothing but an image may be in it.
	Output string
	// Agent is the path of the caisson-agent program, statically linked.
	Agent string
	// Cache keeps the downloaded packages; "" is /var/cache/caisson/packages.
	Cache string
	// KernelPackage is a Debian kernel package, or a metapackage that depends on one; "" is
	// linux-image-cloud-amd64.
	KernelPackage string
	// Kernel, where set, is the path of the kernel to take instead: an uncompressed PVH vmlinux with
	// all drivers built in, as kernel/build.sh makes it.
	Kernel string
}

// Build makes the guest and returns it. An image in Output that was made from the same inputs is
// left as it is; else it is replaced in one step. Packages come from the host's apt, in the
// versions it would install, and are downloaded unless they are in the cache.
func Build(ctx context.Context, o BuildOptions) (Files, error) {
	o.Cache = cmp.Or(o.Cache, "/var/cache/caisson/packages")
	o.KernelPackage = cmp.Or(o.KernelPackage, "linux-image-cloud-amd64")
	output, err := filepath.Abs(o.Output)
	if err != nil {
		return Files{}, err
	}
	if err := replaceable(output); err != nil {
		return Files{}, err
	}
	in, err := gather(ctx, o)
	if err != nil {
		return Files{}, err
	}
	if upToDate(ctx, output, in.digest()) {
		return Open(output)
	}
	b := builder{cache: o.Cache, tree: make(tree), manifest: Manifest{
		Format: manifestFormat, Inputs: in.digest(), Cmdline: Cmdline, Packages: make(map[string]string),
	}}
	if err := b.assemble(ctx, in); err != nil {
		return Files{}, err
	}
	return b.publish(output)
}

// replaceable returns an error if dir has something in it that Build did not make.
func replaceable(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if !slices.Contains([]string{kernelName, initrdName, manifestName}, e.Name()) {
			return fmt.Errorf("%s holds %s, which is no part of a guest; name a folder of its own: %w", dir, e.Name(), errdefs.ErrFailedPrecondition)
		}
	}
	return err
}

type builder struct {
	cache    string
	tree     tree
	kernel   []byte
	manifest Manifest
}

func (b *builder) assemble(ctx context.Context, in inputs) error {
	if err := b.addKernel(ctx, in); err != nil {
		return err
	}
	used, err := addProgram(ctx, b.tree, b.cache, "bin/crun", in.crun)
	if err != nil {
		return err
	}
	for _, d := range used {
		b.manifest.Packages[d.name] = d.version
	}
	for _, dir := range []string{"dev", "etc", "mnt", "proc", "root", "run", "sys", "usr", "var"} {
		b.tree.dir(dir, 0o755)
	}
	b.tree.dir("tmp", 0o1777)
	b.tree.symlink("usr/bin", "../bin")
	b.tree.symlink("usr/lib", "../lib")
	// The kernel opens the console before the agent can mount /dev.
	b.tree.char("dev/console", 0o600, 5, 1)
	b.tree.file("init", 0o755, in.agent)
	// The agent loads modules for the kernel too, under this name. It is not the kernel's default,
	// /sbin/modprobe, which would be run many times over while the kernel starts, for nothing.
	b.tree.symlink("modprobe", "init")
	return nil
}

// publish writes the image beside the output and puts it in its place in one step.
func (b *builder) publish(output string) (Files, error) {
	parent := filepath.Dir(output)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return Files{}, err
	}
	tmp, err := os.MkdirTemp(parent, "."+filepath.Base(output)+"-*")
	if err != nil {
		return Files{}, err
	}
	defer os.RemoveAll(tmp) // by then it is the image that was replaced, if any
	if err := b.write(tmp); err != nil {
		return Files{}, err
	}
	err = unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, output, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.ENOENT) {
		err = unix.Rename(tmp, output)
	}
	if err != nil {
		return Files{}, fmt.Errorf("put the guest in its place at %s: %w", output, err)
	}
	if err := atomicfile.SyncDir(parent); err != nil {
		return Files{}, err
	}
	return Open(output)
}

func (b *builder) write(dir string) error {
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	files := map[string]func(io.Writer) error{
		kernelName: func(w io.Writer) error { _, err := w.Write(b.kernel); return err },
		initrdName: b.tree.writePacked,
	}
	b.manifest.Files = make(map[string]File)
	for name, write := range files {
		file, err := writeFile(filepath.Join(dir, name), write)
		if err != nil {
			return err
		}
		b.manifest.Files[name] = file
	}
	b.manifest.Version = digest(b.manifest.Files, b.manifest.Cmdline, b.manifest.Packages)[:16]
	data, err := json.MarshalIndent(b.manifest, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, manifestName), append(data, '\n'), 0o644)
}

// writeFile makes a file, durably, and describes it.
func writeFile(file string, write func(io.Writer) error) (File, error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	if err := write(f); err != nil {
		return File{}, err
	}
	if err := f.Sync(); err != nil {
		return File{}, err
	}
	return describe(file)
}

// digest hashes values by their Go syntax, in which maps are sorted.
func digest(values ...any) string {
	h := sha256.New()
	for _, v := range values {
		fmt.Fprintf(h, "%#v\n", v)
	}
	return hex.EncodeToString(h.Sum(nil))
}
