package podvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/caisson-vm/caisson/podvm/agent"
)

type unixStat = syscall.Stat_t

// fileMax bounds a file that is copied into a guest, in bytes. The API server holds each object to 1 MiB.
const fileMax = 1 << 20

// insteadOfCopy is what is left to do about what is too large to be copied.
const insteadOfCopy = "put it into an image, and mount that as a volume of type image"

// readFile reads a regular file for the guest, without following a link that took its place, or its directory's.
func readFile(path, name string, info fs.FileInfo) (*agent.File, error) {
	f, err := openAsFound(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, fileMax+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(content) > fileMax {
		return nil, fmt.Errorf("%s has more than %d bytes, too many to be copied into a VM; %s: %w", path, fileMax, insteadOfCopy, errdefs.ErrNotImplemented)
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

// readTries is how often a volume is read, should it change meanwhile.
const readTries = 3

// readVolume reads a volume's folder as it is at one time, and returns its version then.
func readVolume(root string) (files []*agent.File, version string, err error) {
	for range readTries {
		version = dataVersion(root)
		files, err = readTree(root, version)
		switch {
		case dataVersion(root) != version:
			err = fmt.Errorf("%s changed while it was read: %w", root, errdefs.ErrUnavailable)
		case !errors.Is(err, fs.ErrNotExist): // the kubelet removes old links after the switch
			return files, version, err
		}
	}
	return nil, "", err
}

// readTree reads directories, files and links, as they are, but for folders that the kubelet has not
// switched to yet, or not removed yet.
func readTree(root, version string) ([]*agent.File, error) {
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
		if version != "" && e.IsDir() && strings.HasPrefix(name, "..") && filepath.Dir(name) == "." && name != version {
			return fs.SkipDir
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
		if len(all) > agent.FilesMax || total > agent.FilesSize {
			return fmt.Errorf("%s has more than %d files or %d bytes, too many to be copied into a VM; %s: %w", root, agent.FilesMax, agent.FilesSize, insteadOfCopy, errdefs.ErrNotImplemented)
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
	files, version, err := readVolume(path)
	if err != nil {
		return fmt.Errorf("volume: %w", err)
	}
	to.Source = n.give(fileSet{&agent.Files{Name: setName(path), Files: files}, n.m.syncer.turnOf(path)})
	n.record.Volumes = append(n.record.Volumes, path)
	if n.read == nil {
		n.read = map[string]string{}
	}
	n.read[path] = version
	return nil
}

// fileSet is a set of files on its way into a guest.
type fileSet struct {
	files *agent.Files
	turn  semaphore // held while its pieces are sent: others of the same name may not come between
}

// send brings the set into the guest.
func (s fileSet) send(ctx context.Context, rpc agent.AgentClient) error {
	if err := s.turn.lock(ctx); err != nil {
		return err
	}
	defer s.turn.unlock()
	for _, piece := range s.files.Pieces() {
		if _, err := rpc.Files(ctx, &agent.FilesRequest{Files: piece}); err != nil {
			return err
		}
	}
	return nil
}

// give has a set travel with the request for the container, and ahead of it what does not fit there.
func (n *newContainer) give(s fileSet) *agent.Mount_Files {
	size := proto.Size(s.files)
	if n.inline+size <= agent.PieceSize {
		n.inline += size
		return &agent.Mount_Files{Files: s.files}
	}
	n.ahead = append(n.ahead, s)
	return &agent.Mount_Files{Files: &agent.Files{Name: s.files.Name, Single: s.files.Single, Writeback: s.files.Writeback}}
}

// askGuest sends the request, and what has to be there before it.
func (n *newContainer) askGuest(ctx context.Context, rpc agent.AgentClient, request *agent.CreateRequest) (*agent.CreateResponse, error) {
	for _, s := range n.ahead {
		if err := s.send(ctx, rpc); err != nil {
			return nil, fmt.Errorf("volume: %w", err)
		}
	}
	return rpc.Create(ctx, request)
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
