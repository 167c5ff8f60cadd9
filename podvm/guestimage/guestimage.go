// Package guestimage makes and finds what a pod's VM boots: a kernel and an initramfs.
//
// Build assembles them from Debian packages (the kernel and its modules, crun and its libraries)
// and the project's own agent, without installing anything on the host. The same packages and the
// same agent give the same bytes. A built image is a folder:
//
//	vmlinux        the kernel, an uncompressed ELF with the PVH entry point
//	initrd         the initramfs
//	manifest.json  what is in them, and the version named by it
package guestimage

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// Cmdline is what the guest's kernel is told besides what a VMM needs (console=...). It goes into
// the manifest of an image when that is built.
const Cmdline = "quiet loglevel=3 panic=-1" +
	// virtio devices reach all memory: no 64 MiB of bounce buffers.
	" swiotlb=noforce" +
	// A kernel patched for one CPU and patched back when the second is plugged in would cost each
	// clone the pages of its text.
	" noreplace-smp" +
	// No huge page is zeroed, and paid for, for a few bytes.
	" transparent_hugepage=madvise" +
	// What is looked up is spread over these tables at random, and each page of them that a clone touches is
	// its own: no larger ones than for some ten thousand files in use. More make longer chains.
	" dhash_entries=16384 ihash_entries=8192" +
	// Pods mount, unmount and leave namespaces: don't wait for grace periods.
	" rcupdate.rcu_expedited=1" +
	// No timers in an idle guest that watch clocks and CPUs.
	" tsc=reliable nowatchdog" +
	// Tests of the machine that delay the start.
	" cryptomgr.notests no_timer_check"

const (
	kernelName   = "vmlinux"
	initrdName   = "initrd"
	manifestName = "manifest.json"
	// manifestFormat changes when an older daemon could not use a newer image, or the reverse.
	manifestFormat = 2
)

// Files is a built guest.
type Files struct {
	// Dir is the absolute path of its folder, Kernel and Initrd of the files in it.
	Dir, Kernel, Initrd string
	// Version names the guest's content: 16 hex digits.
	Version string
	// Cmdline is the kernel command line it was built for.
	Cmdline string
}

// Manifest is what Build records about an image.
type Manifest struct {
	Format  int    `json:"format"`
	Version string `json:"version"`
	// Inputs is a digest of all that went into the build.
	Inputs string `json:"inputs"`
	// Kernel is its release, as uname -r prints it.
	Kernel  string `json:"kernel"`
	Cmdline string `json:"cmdline"`
	// Packages maps the Debian packages to their versions.
	Packages map[string]string `json:"packages"`
	// Files describes vmlinux and initrd.
	Files map[string]File `json:"files"`
}

// File is a file of an image.
type File struct {
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// Open finds the image in dir and checks that its files are those of its manifest, by their sizes
// (Verify reads them whole). Without an image it returns errdefs.ErrNotFound; a damaged one is
// errdefs.ErrFailedPrecondition.
func Open(dir string) (Files, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Files{}, err
	}
	m, err := readManifest(dir)
	if err != nil {
		return Files{}, err
	}
	for name, want := range m.Files {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			return Files{}, damaged(dir, err)
		}
		if info.Size() != want.Size {
			return Files{}, damaged(dir, fmt.Errorf("%s has %d bytes, not %d", name, info.Size(), want.Size))
		}
	}
	return Files{
		Dir:     dir,
		Kernel:  filepath.Join(dir, kernelName),
		Initrd:  filepath.Join(dir, initrdName),
		Version: m.Version,
		Cmdline: m.Cmdline,
	}, nil
}

// Verify reads the image's files and compares them with the manifest. Its errors are Open's.
func Verify(dir string) error {
	files, err := Open(dir)
	if err != nil {
		return err
	}
	m, err := readManifest(files.Dir)
	if err != nil {
		return err
	}
	for name, want := range m.Files {
		got, err := describe(filepath.Join(files.Dir, name))
		if err != nil {
			return damaged(dir, err)
		}
		if got != want {
			return damaged(dir, fmt.Errorf("%s has the SHA-256 %s, not %s", name, got.SHA256, want.SHA256))
		}
	}
	return nil
}

func readManifest(dir string) (Manifest, error) {
	data, err := os.ReadFile(filepath.Join(dir, manifestName))
	if errors.Is(err, fs.ErrNotExist) {
		return Manifest{}, fmt.Errorf("no guest in %s, run 'caissond guest build': %w", dir, errdefs.ErrNotFound)
	}
	if err != nil {
		return Manifest{}, err
	}
	var m Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return Manifest{}, damaged(dir, err)
	}
	if m.Format != manifestFormat {
		return Manifest{}, fmt.Errorf("the guest in %s was built by another version of this program (format %d, want %d): run 'caissond guest build': %w", dir, m.Format, manifestFormat, errdefs.ErrFailedPrecondition)
	}
	for _, name := range []string{kernelName, initrdName} {
		if _, ok := m.Files[name]; !ok {
			return Manifest{}, damaged(dir, fmt.Errorf("the manifest lacks %s", name))
		}
	}
	return m, nil
}

func damaged(dir string, err error) error {
	return fmt.Errorf("the guest in %s is damaged, run 'caissond guest build': %w: %w", dir, err, errdefs.ErrFailedPrecondition)
}
