package podvm

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// EventKind says what happened.
type EventKind string

// What happens to a container, or to a pod where Event.Container has no id.
const (
	EventCreated EventKind = "created"
	EventStarted EventKind = "started"
	EventStopped EventKind = "stopped"
	EventDeleted EventKind = "deleted"
)

// Event is something that happened, with the statuses after it.
type Event struct {
	Kind      EventKind
	Pod       PodStatus
	Container ContainerStatus
	Time      time.Time
}

// eventBuffer is how many events a reader may be behind.
const eventBuffer = 1024

// broker hands events to its readers and never waits for one.
type broker struct {
	mu      sync.Mutex
	readers map[chan Event]bool
}

func (b *broker) send(e Event) {
	e.Time = time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.readers {
		select {
		case c <- e:
		default:
			slog.Warn("a reader of events is too slow and was dropped", "behind", eventBuffer)
			delete(b.readers, c)
			close(c)
		}
	}
}

// subscribe returns a channel that is closed when ctx ends or its reader is too slow.
func (b *broker) subscribe(ctx context.Context) <-chan Event {
	c := make(chan Event, eventBuffer)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.readers == nil {
		b.readers = map[chan Event]bool{}
	}
	b.readers[c] = true
	context.AfterFunc(ctx, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.readers[c] {
			delete(b.readers, c)
			close(c)
		}
	})
	return c
}
