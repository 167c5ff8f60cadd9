package podvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/fsnotify/fsnotify"
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
func (p *Pod) copyVolume(to *agent.Mount, path string, record *containerRecord) error {
	files, err := readTree(path)
	if errors.Is(err, fs.ErrNotExist) { // the kubelet switched it while it was read
		files, err = readTree(path)
	}
	if err != nil {
		return fmt.Errorf("volume: %w", err)
	}
	set := &agent.Files{Name: setName(path), Files: files}
	to.Source = &agent.Mount_Files{Files: set}
	record.Volumes = append(record.Volumes, path)
	return p.m.syncer.keep(p, path)
}

// syncer keeps copied volumes in step with the host's: the kubelet writes a new folder and then
// switches the link ..data to it, which is one event.
type syncer struct {
	notify *fsnotify.Watcher

	mu      sync.Mutex
	volumes map[string]*Pod // by path; a volume belongs to one pod
}

func newSyncer() (*syncer, error) {
	n, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch volumes: %w; raise fs.inotify.max_user_instances", err)
	}
	s := &syncer{notify: n, volumes: map[string]*Pod{}}
	go s.run()
	return s, nil
}

func (s *syncer) close() error { return s.notify.Close() }

// keep begins to keep a volume in step. It is idempotent.
func (s *syncer) keep(p *Pod, path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.volumes[path] != nil {
		return nil
	}
	if err := s.notify.Add(path); err != nil {
		return fmt.Errorf("watch %s: %w; raise fs.inotify.max_user_watches", path, err)
	}
	s.volumes[path] = p
	return nil
}

// forget ends it for all volumes of a pod.
func (s *syncer) forget(pod string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for path, p := range s.volumes {
		if p.id == pod {
			delete(s.volumes, path)
			s.notify.Remove(path) // an error says that the folder is gone, and its watch with it
		}
	}
}

const dataLink = "..data"

func (s *syncer) run() {
	for {
		select {
		case e, ok := <-s.notify.Events:
			if !ok {
				return
			}
			if filepath.Base(e.Name) == dataLink && e.Has(fsnotify.Create) {
				s.changed(filepath.Dir(e.Name))
			}
		case err, ok := <-s.notify.Errors:
			if !ok {
				return
			}
			slog.Warn("watch volumes", "err", err)
		}
	}
}

// syncLimit bounds one copy into a guest.
const syncLimit = 30 * time.Second

func (s *syncer) changed(path string) {
	s.mu.Lock()
	p := s.volumes[path]
	s.mu.Unlock()
	if p == nil {
		return
	}
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), syncLimit)
		defer cancel()
		if err := p.syncVolume(ctx, path); err != nil {
			slog.Error("keep a volume in step", "pod", p.id, "path", path, "err", err)
		}
	}()
}

func (p *Pod) syncVolume(ctx context.Context, path string) error {
	files, err := readTree(path)
	if err != nil {
		return err
	}
	rpc, err := p.rpc(ctx)
	if err != nil {
		return err
	}
	_, err = rpc.Files(ctx, &agent.FilesRequest{Files: &agent.Files{Name: setName(path), Files: files}})
	return err
}
