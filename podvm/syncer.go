package podvm

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// syncer keeps copied volumes in step with the host's: the kubelet's switch of a volume's content is
// one event.
type syncer struct {
	notify *fsnotify.Watcher
	ended  chan struct{} // closed when no event is handled any more

	mu      sync.Mutex
	volumes map[string]*volume // by path
}

// volume is one that guests have copies of: one guest, but for the moments when a pod is made anew.
type volume struct {
	pods map[*Pod]bool
	turn semaphore // held while it is sent into a guest
	// copying tells that a copy is being made, again that there must be another after it.
	copying, again bool
}

func newSyncer() (*syncer, error) {
	n, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch volumes: %w; raise fs.inotify.max_user_instances", err)
	}
	s := &syncer{notify: n, ended: make(chan struct{}), volumes: map[string]*volume{}}
	go s.run()
	return s, nil
}

func (s *syncer) close() error {
	err := s.notify.Close()
	<-s.ended
	return err
}

// keep begins to keep a volume in step. It is idempotent.
func (s *syncer) keep(p *Pod, path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v := s.volumes[path]; v != nil {
		v.pods[p] = true
		return nil
	}
	if err := s.notify.Add(path); err != nil {
		return fmt.Errorf("watch %s: %w; raise fs.inotify.max_user_watches", path, err)
	}
	s.volumes[path] = &volume{pods: map[*Pod]bool{p: true}, turn: make(semaphore, 1)}
	return nil
}

// turnOf is held while a volume is sent into a guest.
func (s *syncer) turnOf(path string) semaphore {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v := s.volumes[path]; v != nil {
		return v.turn
	}
	return make(semaphore, 1) // its pod is being removed
}

// forget ends it for all volumes of a pod.
func (s *syncer) forget(p *Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for path, v := range s.volumes {
		if delete(v.pods, p); len(v.pods) == 0 {
			delete(s.volumes, path)
			s.notify.Remove(path) // an error says that the folder is gone, and its watch with it
		}
	}
}

func (s *syncer) run() {
	defer close(s.ended)
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

// changed has a volume copied anew: once, however often it changes meanwhile, and then once more.
func (s *syncer) changed(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.volumes[path]
	if v == nil {
		return
	}
	if v.copying {
		v.again = true
		return
	}
	v.copying = true
	go s.copy(path, v)
}

// syncLimit bounds one copy into a guest; after a failure it is tried again so many times, with a
// pause that doubles.
const (
	syncLimit   = 30 * time.Second
	syncRetries = 5
	syncPause   = time.Second
)

func (s *syncer) copy(path string, v *volume) {
	for more := true; more; {
		s.mu.Lock()
		v.again = false
		var pods []*Pod
		for p := range v.pods {
			pods = append(pods, p)
		}
		s.mu.Unlock()
		for _, p := range pods {
			p.copyAgain(path)
		}
		s.mu.Lock()
		more = v.again
		v.copying = more
		s.mu.Unlock()
	}
}

// copyAgain replaces a guest's copy of a volume by what it holds now.
func (p *Pod) copyAgain(path string) {
	pause := syncPause
	for try := 0; ; try++ {
		err := p.copyOnce(path)
		if err == nil || !p.running() {
			return
		}
		if try == syncRetries {
			slog.Error("keep a volume in step", "pod", p.id, "path", path, "err", err)
			return
		}
		time.Sleep(pause)
		pause *= 2
	}
}

func (p *Pod) copyOnce(path string) error {
	ctx, cancel := context.WithTimeout(context.Background(), syncLimit)
	defer cancel()
	files, _, err := readVolume(path)
	if err != nil {
		return err
	}
	rpc, err := p.rpc(ctx)
	if err != nil {
		return err
	}
	return fileSet{&agent.Files{Name: setName(path), Files: files}, p.m.syncer.turnOf(path)}.send(ctx, rpc)
}
