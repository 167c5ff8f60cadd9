package guestimage

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Keep opens the image in dir as Open does, and keeps it in a folder of the caller's, by hard links or, on
// another file system, as copies: a build replaces dir under a daemon that runs, and all that this starts is to
// be of one image. What was kept before goes. Without space for it the image is used where it is.
func Keep(dir, folder string) (Files, error) {
	there, err := Open(dir)
	if err != nil {
		return Files{}, err
	}
	kept, err := keep(there.Dir, folder)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		slog.Warn("no space to keep the guest: build no other one while the daemon runs", "dir", there.Dir, "err", err)
		return there, os.RemoveAll(folder)
	}
	if err != nil {
		return Files{}, fmt.Errorf("keep the guest of %s: %w", there.Dir, err)
	}
	return kept, nil
}

func keep(dir, folder string) (Files, error) {
	opened, err := os.Open(dir) // its files are of one image, also if another folder takes its place meanwhile
	if err != nil {
		return Files{}, err
	}
	defer opened.Close()
	if same(opened, folder) {
		return Files{}, fmt.Errorf("it is what the daemon replaces at its start; build it in another folder and name that in the key guest: %w", errdefs.ErrInvalidArgument)
	}
	if err := os.RemoveAll(folder); err != nil {
		return Files{}, err
	}
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return Files{}, err
	}
	for _, name := range []string{kernelName, initrdName, manifestName} {
		if err := take(fmt.Sprintf("/proc/self/fd/%d/%s", opened.Fd(), name), filepath.Join(folder, name)); err != nil {
			return Files{}, err
		}
	}
	return Open(folder)
}

func same(f *os.File, path string) bool {
	one, err1 := f.Stat()
	two, err2 := os.Stat(path)
	return err1 == nil && err2 == nil && os.SameFile(one, two)
}

// take links a file, or copies it where it can't be linked.
func take(from, to string) error {
	if unix.Linkat(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.AT_SYMLINK_FOLLOW) == nil {
		return nil
	}
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, source)
	return errors.Join(err, f.Close())
}
