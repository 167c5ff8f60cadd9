package share

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/caisson-vm/caisson/podvm/vmm/process"
)

// served is a pod that directories are served to.
type served struct {
	Pod
	program []string
	life    context.Context // until Release or Close
	end     context.CancelFunc
	broken  chan struct{} // has a value when a stream or the process may have ended

	turn    chan struct{} // held by whoever changes the rest
	process *process.Process
	dirs    map[string]Dir    // by tag
	relays  map[string]*relay // streams that go through this daemon, by tag
	opening map[string]chan opened
}

func newServed(pod Pod, program []string) *served {
	p := &served{
		Pod: pod, program: program, broken: make(chan struct{}, 1), turn: make(chan struct{}, 1),
		dirs: map[string]Dir{}, relays: map[string]*relay{}, opening: map[string]chan opened{},
	}
	p.life, p.end = context.WithCancel(context.Background())
	go p.mend()
	return p
}

// lock takes the turn. It fails where the pod is released.
func (p *served) lock(ctx context.Context) error {
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("wait for another directory: %w", ctx.Err())
	}
	if err := p.life.Err(); err != nil {
		p.unlock()
		return fmt.Errorf("the pod is being stopped: %w", err)
	}
	return nil
}

func (p *served) unlock() { <-p.turn }

// serve has the process serve a directory, unless it does. The caller has the turn.
func (p *served) serve(ctx context.Context, d Dir) error {
	have, err := p.ask(ctx, request{Tag: d.Tag}, nil)
	if err != nil {
		return err
	}
	if have.Connected || p.relays[d.Tag].runs() {
		return nil
	}
	if !have.Placed {
		if err := p.attach(ctx, d); err != nil {
			return err
		}
	}
	return p.connect(ctx, d)
}

// look has mend look soon.
func (p *served) look() {
	select {
	case p.broken <- struct{}{}:
	default:
	}
}

const (
	// Pauses between attempts to mend: a guest that can break things may not keep the node busy.
	pauseMin, pauseMax = 100 * time.Millisecond, time.Minute
	// calm is how long after an attempt the next one has no pause before it.
	calm = 2 * pauseMax
	// mendLimit bounds an attempt.
	mendLimit = 30 * time.Second
)

// mend has all directories served, until the pod is released: it replaces a process that has died, and
// joins guests again whose stream has ended. What was mended may break at once, and is paused for as well.
func (p *served) mend() {
	pause, last := pauseMin, time.Time{}
	for failed := false; ; {
		due := failed
		if !due {
			select {
			case <-p.broken:
				due = true
			case <-time.After(pauseMax):
			case <-p.life.Done():
				return
			}
		}
		switch {
		case time.Since(last) > calm:
			pause = pauseMin
		case due:
			select {
			case <-time.After(pause):
			case <-p.life.Done():
				return
			}
			pause = min(2*pause, pauseMax)
		}
		failed = !p.mended()
		if due || failed { // nothing may have been to mend where nobody said so
			last = time.Now()
		}
	}
}

// mended tries once, and tells whether that is enough.
func (p *served) mended() bool {
	ctx, cancel := context.WithTimeout(p.life, mendLimit)
	defer cancel()
	if p.lock(ctx) != nil {
		return p.life.Err() != nil
	}
	defer p.unlock()
	if len(p.dirs) == 0 {
		return true
	}
	if err := p.run(ctx); err != nil {
		return p.report("", err)
	}
	done := true
	for _, d := range p.dirs {
		done = p.report(d.Path, p.serve(ctx, d)) && done
	}
	return done
}

// report logs what could not be mended, and tells whether there was nothing.
func (p *served) report(path string, err error) bool {
	if err == nil || p.life.Err() != nil {
		return true
	}
	slog.Warn("serve a host directory again: the pod waits for it", "pod", p.ID, "path", path, "err", err)
	return false
}
