package podvm

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
)

type unixStat = syscall.Stat_t

// What of a volume is copied into a guest at once. The API server holds each object to 1 MiB.
const (
	fileMax   = 1 << 20
	volumeMax = 4 << 20
	entryMax  = 2048
)

// readFile reads a regular file for the guest, without following a link that took its place.
func readFile(path, name string, info fs.FileInfo) (*agent.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, fileMax+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(content) > fileMax {
		return nil, fmt.Errorf("%s has more than %d bytes, too many to be copied into a VM: %w", path, fileMax, errdefs.ErrNotImplemented)
	}
	out := describe(name, info)
	out.Content = content
	return out, nil
}

func describe(name string, info fs.FileInfo) *agent.File {
	f := &agent.File{Path: name}
	if st, ok := info.Sys().(*unixStat); ok {
		f.Mode, f.Uid, f.Gid = st.Mode, st.Uid, st.Gid
	}
	return f
}

// readTree reads a volume's folder: directories, files and links, as they are.
func readTree(root string) ([]*agent.File, error) {
	var all []*agent.File
	total := 0
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		f := describe(name, info)
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			f.Target, err = os.Readlink(path)
		case info.Mode().IsRegular():
			f, err = readFile(path, name, info)
		case !info.IsDir():
			return fmt.Errorf("%s is a %s: %w", path, info.Mode().Type(), errdefs.ErrNotImplemented)
		}
		if err != nil {
			return err
		}
		all, total = append(all, f), total+len(f.Content)
		if len(all) > entryMax || total > volumeMax {
			return fmt.Errorf("%s has more than %d files or %d bytes, too many to be copied into a VM: %w", root, entryMax, volumeMax, errdefs.ErrNotImplemented)
		}
		return nil
	})
	return all, err
}

// copyVolume copies a configMap, secret, projected or downwardAPI volume in, and keeps it in step.
func (n *newContainer) copyVolume(to *agent.Mount, path string) error {
	if err := n.m.syncer.keep(n.Pod, path); err != nil {
		return err
	}
	version := dataVersion(path)
	files, err := readTree(path)
	if errors.Is(err, fs.ErrNotExist) { // the kubelet switched it while it was read
		version = dataVersion(path)
		files, err = readTree(path)
	}
	if err != nil {
		return fmt.Errorf("volume: %w", err)
	}
	set := &agent.Files{Name: setName(path), Files: files}
	to.Source = &agent.Mount_Files{Files: set}
	n.record.Volumes = append(n.record.Volumes, path)
	if n.read == nil {
		n.read = map[string]string{}
	}
	n.read[path] = version
	return nil
}

// catchUp copies what was changed since the container's copies were read: before the guest had them
// no change could be passed on.
func (n *newContainer) catchUp() {
	for path, version := range n.read {
		if dataVersion(path) != version {
			n.m.syncer.changed(path)
		}
	}
}

// dataLink leads to what a volume holds now. The kubelet writes a new folder and then switches it.
const dataLink = "..data"

// dataVersion tells apart what a volume held at one time and at another.
func dataVersion(path string) string {
	target, err := os.Readlink(filepath.Join(path, dataLink))
	if err != nil {
		return "" // a volume without versions
	}
	return target
}
