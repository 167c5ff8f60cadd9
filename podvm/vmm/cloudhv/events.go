package cloudhv

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"

	"github.com/fsnotify/fsnotify"
)

// event is one entry of Cloud Hypervisor's event monitor. The monitor writes to a file, not to a
// pipe, so that nothing is lost while no daemon reads.
// Source: docs/event-monitor.md of Cloud Hypervisor.
type event struct {
	Source     string            `json:"source"`
	Event      string            `json:"event"`
	Properties map[string]string `json:"properties"`
}

// watcher tells VMs when their event files grow. There is one per driver: the number of inotify
// instances is limited, and a node has hundreds of VMs.
type watcher struct {
	notify *fsnotify.Watcher

	mu    sync.Mutex
	grown map[string]chan struct{} // by path
}

func newWatcher() (*watcher, error) {
	n, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch files: %w; raise fs.inotify.max_user_instances", err)
	}
	w := &watcher{notify: n, grown: map[string]chan struct{}{}}
	go w.run()
	return w, nil
}

func (w *watcher) run() {
	for {
		select {
		case e, ok := <-w.notify.Events:
			if !ok {
				return
			}
			w.wake(e.Name)
		case err, ok := <-w.notify.Errors:
			if !ok {
				return
			}
			slog.Warn("watch event files", "err", err)
			w.wakeAll() // an overflow: any file may have grown
		}
	}
}

func (w *watcher) wake(path string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if c, ok := w.grown[path]; ok {
		wake(c)
	}
}

func (w *watcher) wakeAll() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.grown {
		wake(c)
	}
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // it is awake already
	}
}

// add watches an existing file. The channel has a value when there may be something to read,
// which is the case at once.
func (w *watcher) add(path string) (<-chan struct{}, error) {
	c := make(chan struct{}, 1)
	c <- struct{}{}
	w.mu.Lock()
	w.grown[path] = c
	w.mu.Unlock()
	if err := w.notify.Add(path); err != nil {
		w.remove(path)
		return nil, fmt.Errorf("watch %s: %w; raise fs.inotify.max_user_watches", path, err)
	}
	return c, nil
}

func (w *watcher) remove(path string) {
	w.mu.Lock()
	delete(w.grown, path)
	w.mu.Unlock()
	w.notify.Remove(path) // an error says that the file is gone, and its watch with it
}

// eventsMax bounds an event file, in bytes. A guest can make Cloud Hypervisor write events by
// resetting devices.
const eventsMax = 1 << 20

// eventReader reads what has been added to an event file.
type eventReader struct {
	path   string
	offset int64
}

// next returns the complete events that were added since the last call.
func (r *eventReader) next() ([]event, error) {
	f, err := os.Open(r.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.NewSectionReader(f, r.offset, eventsMax+1-r.offset))
	if err != nil {
		return nil, err
	}
	if r.offset+int64(len(data)) > eventsMax {
		return nil, fmt.Errorf("%s has more than %d bytes: the guest floods it", r.path, eventsMax)
	}
	var all []event
	d := json.NewDecoder(bytes.NewReader(data))
	for {
		var e event
		done := d.InputOffset()
		err := d.Decode(&e)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			r.offset += done
			return all, nil
		}
		if err != nil {
			return all, fmt.Errorf("%s: %w", r.path, err)
		}
		all = append(all, e)
	}
}
