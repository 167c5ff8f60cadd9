package guest

import (
	"context"
	"sync"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// hub tells watchers the latest state of each container. A slow watcher misses states in between,
// never the last.
type hub struct {
	mu       sync.Mutex
	states   map[string]*agent.ContainerState
	watchers map[*watcher]bool
}

type watcher struct {
	// pending are the containers to tell of, in order.
	pending []string
	more    chan struct{}
}

func newHub() *hub {
	return &hub{states: make(map[string]*agent.ContainerState), watchers: make(map[*watcher]bool)}
}

// set makes a state known. It is not changed afterwards.
func (h *hub) set(s *agent.ContainerState) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.states[s.Id] = s
	for w := range h.watchers {
		w.add(s.Id)
	}
}

// forget drops a container that is no more.
func (h *hub) forget(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.states, id)
}

func (w *watcher) add(id string) {
	for _, p := range w.pending {
		if p == id {
			return
		}
	}
	w.pending = append(w.pending, id)
	select {
	case w.more <- struct{}{}:
	default:
	}
}

// follow sends all states, an empty one that says so, and then each change, until ctx ends.
func (h *hub) follow(ctx context.Context, send func(*agent.ContainerState) error) error {
	w := &watcher{more: make(chan struct{}, 1)}
	h.mu.Lock()
	for id := range h.states {
		w.add(id)
	}
	h.watchers[w] = true
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		delete(h.watchers, w)
		h.mu.Unlock()
	}()
	if err := h.drain(w, send); err != nil {
		return err
	}
	if err := send(&agent.ContainerState{Synced: true}); err != nil {
		return err
	}
	for {
		if err := h.drain(w, send); err != nil {
			return err
		}
		select {
		case <-w.more:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// drain sends what is pending.
func (h *hub) drain(w *watcher, send func(*agent.ContainerState) error) error {
	for {
		h.mu.Lock()
		if len(w.pending) == 0 {
			h.mu.Unlock()
			return nil
		}
		s := h.states[w.pending[0]]
		w.pending = w.pending[1:]
		h.mu.Unlock()
		if s == nil {
			continue
		}
		if err := send(s); err != nil {
			return err
		}
	}
}
