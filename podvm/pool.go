package podvm

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/caisson-vm/caisson/podvm/vmm"
)

// pool keeps a few clones warm, for pods to come: each has its network namespace and its tap, runs, and
// has rehearsed a container, so that most of what it will need of its template's memory it has. Which
// pod it becomes is not known before. A start that finds none makes its own clone.
//
// Before them come clones that nobody gets, which teach the node's template what its clones write. They are made
// also where none are kept.
//
// Until then it is a pod that is being started: a daemon that dies leaves it to Recover.
type pool struct {
	m      *Manager
	size   int
	ctx    context.Context // that of its work
	cancel context.CancelFunc
	work   sync.WaitGroup
	wanted chan struct{} // holds a value when one may be missing
	quiet  time.Duration // for so long nothing else was to be done before one is made
	// lessons counts attempts in a row to teach a template, which failed; it belongs to the work.
	lessons int

	mu    sync.Mutex
	ready []*birth
	busy  int       // calls that are in progress
	since time.Time // when the last of them ended
}

// Warm clones take nothing from who is in a hurry. After a failure the next attempt waits.
const (
	poolQuiet = 2 * time.Second
	poolRetry = time.Minute
)

func newPool(m *Manager, size int) *pool {
	p := &pool{m: m, size: size, wanted: make(chan struct{}, 1), quiet: poolQuiet}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

// start fills the pool, now and whenever one is taken.
func (p *pool) start() {
	if p.size == 0 && p.learner() == nil {
		return
	}
	p.want()
	p.work.Go(func() {
		for {
			select {
			case <-p.wanted:
				p.fill()
			case <-p.ctx.Done():
				return
			}
		}
	})
}

func (p *pool) want() {
	select {
	case p.wanted <- struct{}{}:
	default:
	}
}

// close ends the clones that wait.
func (p *pool) close() error {
	p.cancel()
	p.work.Wait()
	p.mu.Lock()
	left := p.ready
	p.ready = nil
	p.mu.Unlock()
	var group errgroup.Group
	for _, b := range left {
		group.Go(func() error { return b.discard() })
	}
	return group.Wait()
}

// count is how many are ready.
func (p *pool) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.ready)
}

// take returns one, or nil.
func (p *pool) take() *birth {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.takeLocked()
}

func (p *pool) takeLocked() *birth {
	for i, b := range p.ready {
		select {
		case <-b.machine().Done(): // left to whoever waits for that, and discards it
			continue
		default:
		}
		p.ready = slices.Delete(p.ready, i, i+1)
		b.began, b.phases = time.Now(), nil
		p.want()
		return b
	}
	return nil
}

// use says that a call is in progress, and the function that it returns that it has ended.
func (p *pool) use() func() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.busy++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.busy--
		p.since = time.Now()
	}
}

// idle is how long nothing has been in progress.
func (p *pool) idle() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.busy > 0 {
		return 0
	}
	return time.Since(p.since)
}

// learner is the driver, where clones can teach the template that all pods are made of; else nil.
func (p *pool) learner() vmm.Learner {
	if p.m.o.Templates == nil || p.m.o.Scope == "namespace" {
		return nil
	}
	l, _ := p.m.o.Driver.(vmm.Learner)
	return l
}

// lessonsMax is how many attempts to teach a template may fail in a row: then its clones are as slow as they
// are without.
const lessonsMax = 3

// untaught tells whether a clone has still to teach the template. It waits for the template.
func (p *pool) untaught() bool {
	l := p.learner()
	if l == nil || p.lessons >= lessonsMax {
		return false
	}
	template, err := p.m.o.Templates.Template(p.ctx, "")
	return err == nil && !l.Learned(template)
}

// teach has a clone with a container teach its template.
func (p *pool) teach(b *birth) {
	if err := p.learner().Learn(b.machine()); err != nil {
		p.lessons++
		slog.Warn("the template does not learn what its clones write: they start more slowly", "attempt", p.lessons, "of", lessonsMax, "err", err)
		return
	}
	p.lessons = 0
}

// fill makes what is missing.
func (p *pool) fill() {
	for {
		lesson := p.untaught()
		if !lesson && p.count() >= p.size {
			return
		}
		for wait := p.quiet - p.idle(); wait > 0; wait = p.quiet - p.idle() {
			if !p.sleep(wait) {
				return
			}
		}
		b, err := p.warm(lesson)
		if err != nil {
			if p.ctx.Err() != nil {
				return
			}
			if lesson {
				p.lessons++
			}
			slog.Warn("no clone can be made ahead: the next attempt is in "+poolRetry.String(), "err", err)
			if !p.sleep(poolRetry) {
				return
			}
			continue
		}
		if lesson {
			p.teach(b)
			p.putAway(b)
			continue
		}
		slog.Info("a clone is warm", "pod", b.id, "ms", time.Since(b.began).Milliseconds())
		p.keep(b)
	}
}

// sleep returns whether the pool's work goes on after that time.
func (p *pool) sleep(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-p.ctx.Done():
		return false
	}
}

// keep adds one, and sees to its end.
func (p *pool) keep(b *birth) {
	v := b.machine() // a pod that takes it may have another one soon
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ready = append(p.ready, b)
	p.work.Go(func() {
		select {
		case <-v.Done():
		case <-p.ctx.Done():
			return
		}
		if p.drop(b) {
			slog.Warn("a warm clone has ended", "pod", b.id, "err", v.Info().Err)
			p.putAway(b)
			p.want()
		}
	})
}

// putAway discards a clone that nobody will have.
func (p *pool) putAway(b *birth) {
	if err := b.discard(); err != nil {
		slog.Error("take back a warm clone: the next start of the daemon tries again", "pod", b.id, "err", err)
	}
}

// drop takes out this one, if it is still there.
func (p *pool) drop(b *birth) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, r := range p.ready {
		if r == b {
			p.ready = slices.Delete(p.ready, i, i+1)
			return true
		}
	}
	return false
}

// warm makes one, with a container in it where it is for a lesson. What fails is undone.
func (p *pool) warm(lesson bool) (*birth, error) {
	ctx, cancel := context.WithTimeout(p.ctx, startLimit)
	defer cancel()
	m := p.m
	b := newBirth(m.newPod(newID(), PodConfig{}, m.o.Driver))
	if err := b.warmUp(ctx, lesson); err != nil {
		return nil, errors.Join(b.explain(err), b.discard())
	}
	b.warm = true
	return b, nil
}

func (b *birth) warmUp(ctx context.Context, lesson bool) error {
	if err := b.makeFolders(); err != nil {
		return err
	}
	if err := b.record.set(func(*podRecord) {}); err != nil {
		return err
	}
	if err := b.open(); err != nil {
		return err
	}
	if err := b.clone(ctx, b.m.o.Driver); err != nil {
		return err
	}
	rpc, err := b.client.RPC(ctx)
	if err != nil {
		return err
	}
	if lesson {
		return b.rehearseStart(ctx, rpc)
	}
	return rehearse(ctx, rpc)
}

// discard takes back a VM that was to be a pod's. What can't be taken back now is at the next start.
func (b *birth) discard() error {
	ctx, cancel := context.WithTimeout(context.Background(), eraseLimit)
	defer cancel()
	defer b.closeTap()
	return b.erase(ctx)
}
