package podvm

import (
	"context"
	"sync"
)

// tasks are the goroutines that follow one VM. The zero value is ready.
type tasks struct {
	running sync.WaitGroup

	mu      sync.Mutex
	stopped bool
	next    int
	cancels map[int]context.CancelFunc
}

// start runs do until it returns. Its context ends with the tasks, and when cancel is called; after
// stop it is not run at all, and ok is false.
func (t *tasks) start(do func(context.Context)) (cancel func(), ok bool) {
	ctx, cancel := context.WithCancel(context.Background())
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped {
		cancel()
		return cancel, false
	}
	if t.cancels == nil {
		t.cancels = map[int]context.CancelFunc{}
	}
	id := t.next
	t.next++
	t.cancels[id] = cancel
	t.running.Go(func() {
		defer t.end(id)
		do(ctx)
	})
	return cancel, true
}

func (t *tasks) end(id int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cancels[id]()
	delete(t.cancels, id)
}

// stop has all of them end, and waits for none.
func (t *tasks) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopped = true
	for _, cancel := range t.cancels {
		cancel()
	}
}

// wait returns when all have ended.
func (t *tasks) wait() { t.running.Wait() }
