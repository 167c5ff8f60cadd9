// Package podvm runs pods as virtual machines: what happens in which order, what is recorded, and
// how it is undone. It knows drivers, network, images and the guest's agent by small interfaces.
package podvm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/singleflight"

	"github.com/caisson-vm/caisson/imagestore"
	"github.com/caisson-vm/caisson/network"
	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// Network is what podvm needs of the network; *network.CNI is one.
type Network interface {
	Open(id string) (tap *os.File, err error)
	Setup(ctx context.Context, p network.Pod) (*network.Attachment, error)
	Teardown(ctx context.Context, p network.Pod) error
	OpenTap(a *network.Attachment, i int) (*os.File, error)
	GC(ctx context.Context, pods []string) error
}

// Images is what podvm needs of the image store.
type Images interface {
	// Image returns the image of an id; errdefs.ErrNotFound.
	Image(id string) (imagestore.Image, error)
	// Link hard-links the image's file to path and returns the image; errdefs.ErrNotFound, and
	// errdefs.ErrAlreadyExists where path is another file.
	Link(id, path string) (imagestore.Image, error)
}

// Templates is what podvm needs of the template store.
type Templates interface {
	// Template returns the folder of the scope's template; Worked reports a clone that answered, Failed
	// one that did not start.
	Template(ctx context.Context, scope string) (string, error)
	Worked(dir string)
	Failed(dir string)
	// Disk is what the scratch disk of a clone begins as a copy of.
	Disk(dir string) string
}

// Observer is told what metrics count. A nil Observer is none.
type Observer interface {
	// ObserveStart is called when a pod has started, of "warm", "clone" or "boot".
	ObserveStart(origin string, phases []Phase)
	// ObserveFailedStart is called when a start has failed, or was given up, and was taken back.
	ObserveFailedStart(phases []Phase)
	ObserveFallback()
	// ObserveLoss is called when a pod lost its VM: "VMGone", it ended, "OOMKilled", the node had no memory
	// for it, or "Unreachable", its guest did not answer.
	ObserveLoss(reason string)
}

// Options are what a Manager is made of.
type Options struct {
	// Root survives a reboot; images and pods are on its file system. State is for sockets.
	Root, State string
	// Driver starts new pods. Drivers, by name, attach to those that run already; Driver is one of them.
	Driver  vmm.Driver
	Drivers map[string]vmm.Driver
	Guest   guestimage.Files
	Network Network
	Images  Images
	// Shares serves directories of the host to guests.
	Shares Shares
	// Templates, where set, are what pods are cloned from, one per Scope: "node", "namespace".
	Templates Templates
	Scope     string
	// Size is what a VM starts with and a pod without limits gets, Max what it can grow to.
	Size, Max vmm.Size
	// MaxClone is Max of clones, and of the templates. Pods that may have more memory boot.
	MaxClone vmm.Size
	Scratch  *Scratch
	// DAX asks that pods share the pages of their images, where the driver can.
	DAX bool
	// NodeEmptyDirs has the emptyDirs of pods on the node, but for those of medium Memory.
	NodeEmptyDirs bool
	// Warm is how many clones are kept ready for pods to come; only where one template serves them all.
	Warm int
	// Watchdog is how long a pod's guest may answer nothing before its VM is killed; 0: for ever.
	Watchdog time.Duration
	Observer Observer
}

// Manager holds the node's pods.
type Manager struct {
	o       Options
	layout  layout
	cgroups cgroups
	syncer  *syncer
	clocks  tasks
	events  broker
	pool    *pool
	// patience is answerLimit, attach attachLimit.
	patience, attach time.Duration
	// paths are those of the host that are being looked up.
	paths singleflight.Group

	mu         sync.Mutex
	pods       map[string]*Pod
	containers map[string]*Container
	names      map[podName]*start // pods that are there or on their way
}

// podName is what the kubelet knows a pod by.
type podName struct {
	name, namespace, uid string
	attempt              uint32
}

func nameOf(c PodConfig) podName { return podName{c.Name, c.Namespace, c.UID, c.Attempt} }

// start is one call of Run; further calls for the same pod wait for it.
type start struct {
	pod   *Pod
	birth *birth
	done  chan struct{} // closed when err is set
	err   error
	// waiting is how many calls wait for it; Manager.mu.
	waiting int
	// unwanted is closed by giveUp; both are nil for a pod that is there.
	unwanted <-chan struct{}
	giveUp   func()
}

// givenUp tells whether nobody wanted it any more at some time.
func (s *start) givenUp() bool {
	select {
	case <-s.unwanted:
		return true
	default:
		return false
	}
}

// doing says in which phases it is.
func (s *start) doing() string {
	if s.birth == nil {
		return ""
	}
	if doing := s.birth.doing(); doing != "" {
		return ", in its phase " + doing
	}
	return ""
}

// Limits of operations that are the daemon's own: they go on when the caller gives up, and a retry
// joins them.
const (
	startLimit = 3 * time.Minute
	opLimit    = 2 * time.Minute
)

// New makes a Manager. Its caller holds the locks on Root and State.
func New(o Options) (*Manager, error) {
	m := &Manager{
		o: o, layout: layout{o.Root, o.State}, patience: answerLimit, attach: attachLimit,
		pods: map[string]*Pod{}, containers: map[string]*Container{}, names: map[podName]*start{},
	}
	for _, dir := range []string{m.layout.pods(), o.State} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("folders of pods: %w", noSpace(err, dir))
		}
	}
	var err error
	if m.syncer, err = newSyncer(); err != nil {
		return nil, err
	}
	if o.Templates == nil || o.Scope == "namespace" {
		o.Warm = 0
	}
	m.pool = newPool(m, o.Warm)
	return m, nil
}

// Warm begins to keep clones ready for pods to come, once Recover is done.
func (m *Manager) Warm() { m.pool.start() }

// WarmClones is how many are ready.
func (m *Manager) WarmClones() int { return m.pool.count() }

// StopContainers asks all containers to stop, and kills those that have not after grace: the machine goes down, and
// their VMs with it.
func (m *Manager) StopContainers(ctx context.Context, grace time.Duration) {
	var group sync.WaitGroup
	for _, c := range m.Containers() {
		if c.record.now().State == Exited {
			continue
		}
		group.Go(func() {
			if err := c.Stop(ctx, grace); err != nil {
				slog.Warn("stop a container", "pod", c.pod.id, "container", c.id, "err", err)
			}
		})
	}
	group.Wait()
}

// Close lets go of everything; VMs and their containers run on.
func (m *Manager) Close() error {
	err := m.pool.close()
	m.clocks.stop()
	m.clocks.wait()
	for _, p := range m.Pods() {
		p.letGo()
	}
	for _, p := range m.Pods() {
		p.tasks.wait()
	}
	return errors.Join(err, m.syncer.close())
}

// Events returns what happens from now on. The channel is closed when ctx ends, or when its reader
// has fallen too far behind.
func (m *Manager) Events(ctx context.Context) <-chan Event { return m.events.subscribe(ctx) }

// Pods lists all pods, in no order.
func (m *Manager) Pods() []*Pod {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]*Pod, 0, len(m.pods))
	for _, p := range m.pods {
		all = append(all, p)
	}
	return all
}

// Containers lists all containers, in no order.
func (m *Manager) Containers() []*Container {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]*Container, 0, len(m.containers))
	for _, c := range m.containers {
		all = append(all, c)
	}
	return all
}

// Starting is how many pods are being started, by the phase that runs for the longest time.
func (m *Manager) Starting() map[string]int {
	count := map[string]int{}
	for _, phase := range startPhases {
		count[phase] = 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.names {
		if s.birth == nil { // it is there
			continue
		}
		if phase := s.birth.phase(); phase != "" {
			count[phase]++
		}
	}
	return count
}

// Cloned tells whether a pod that runs is a clone of this template.
func (m *Manager) Cloned(template string) bool {
	for _, p := range m.Pods() {
		if r := p.record.now(); r.Stage == ready && r.VM.Template == template {
			return true
		}
	}
	return false
}

// Pod finds a pod by its id or a unique prefix of it. Errors: errdefs.ErrNotFound,
// errdefs.ErrInvalidArgument for a prefix of several.
func (m *Manager) Pod(id string) (*Pod, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return find("pod", m.pods, id)
}

// Container finds a container as Pod does.
func (m *Manager) Container(id string) (*Container, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return find("container", m.containers, id)
}

func find[T any](what string, all map[string]T, id string) (T, error) {
	found, ok := all[id]
	if ok || id == "" {
		if !ok {
			return found, fmt.Errorf("%s id is empty: %w", what, errdefs.ErrInvalidArgument)
		}
		return found, nil
	}
	matches := 0
	for full, v := range all {
		if strings.HasPrefix(full, id) {
			found = v
			matches++
		}
	}
	var none T
	switch matches {
	case 0:
		return none, fmt.Errorf("%s %s: %w", what, id, errdefs.ErrNotFound)
	case 1:
		return found, nil
	}
	return none, fmt.Errorf("%s %s: %d have an id that begins so: %w", what, id, matches, errdefs.ErrInvalidArgument)
}

// newID makes the id of a pod or container: 64 hex digits.
func newID() string {
	b := make([]byte, 32)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// operation is the context of work that belongs to the daemon and not to the caller.
func operation(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), limit)
}

// Run starts a pod. A call for a pod that is being started waits for that; one for a pod that runs
// returns it. A pod of the same name and attempt that has stopped is errdefs.ErrAlreadyExists. Where all
// calls for a pod are cancelled its start is given up.
func (m *Manager) Run(ctx context.Context, c PodConfig) (*Pod, error) {
	driver, err := m.driverFor(c)
	if err != nil {
		return nil, err
	}
	s, first := m.reserve(c, driver)
	if first {
		go m.run(ctx, s, c)
	}
	patient, cancel := answerable(ctx)
	defer cancel()
	select {
	case <-s.done:
	case <-patient.Done():
		return nil, fmt.Errorf("start of pod %s/%s %s: %w", c.Namespace, c.Name, m.leave(ctx, s), patient.Err())
	}
	if s.err != nil && !first && s.givenUp() {
		return m.Run(ctx, c) // by those who called before
	}
	if s.err != nil {
		return nil, s.err
	}
	if status := s.pod.Status(); !first && status.State != Ready {
		return nil, fmt.Errorf("pod %s/%s, attempt %d, is there as %s and %s: remove it first: %w", c.Namespace, c.Name, c.Attempt, s.pod.id, status.State, errdefs.ErrAlreadyExists)
	}
	return s.pod, nil
}

// driverFor chooses what a pod runs on. Pods that are to be part of the node itself can't be VMs,
// and no driver runs pods outside of one.
func (m *Manager) driverFor(c PodConfig) (vmm.Driver, error) {
	for _, ns := range []struct {
		name   string
		wanted bool
	}{{"hostNetwork", c.HostNetwork}, {"hostPID", c.HostPID}, {"hostIPC", c.HostIPC}} {
		if ns.wanted {
			return nil, fmt.Errorf("%s: a pod in a VM can't share the node's namespaces; run it on a node with another runtime: %w", ns.name, errdefs.ErrNotImplemented)
		}
	}
	return m.o.Driver, nil
}

func (m *Manager) reserve(c PodConfig, driver vmm.Driver) (s *start, first bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s, ok := m.names[nameOf(c)]; ok {
		s.waiting++
		return s, false
	}
	var b *birth
	if m.clonable(c) {
		b = m.pool.take()
	}
	if b == nil {
		b = newBirth(m.newPod(newID(), c, driver))
	}
	unwanted := make(chan struct{})
	s = &start{done: make(chan struct{}), pod: b.Pod, birth: b, waiting: 1, unwanted: unwanted, giveUp: sync.OnceFunc(func() { close(unwanted) })}
	m.names[nameOf(c)] = s
	return s, true
}

// late is how much before its deadline the end of a call is taken for that: a client's word that it waits no
// longer may come first.
const late = time.Second

// answerable is a call's context that ends while its client still waits for the answer.
func answerable(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, limited := ctx.Deadline()
	if !limited {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, deadline.Add(-late/2))
}

// leave ends a call's waiting for a start, and says what becomes of that. One that takes too long for its callers
// goes on, because they will ask again; one whose last caller has cancelled its call, as the kubelet does for a
// pod that is deleted meanwhile, is given up.
func (m *Manager) leave(ctx context.Context, s *start) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	s.waiting--
	deadline, limited := ctx.Deadline()
	tooLate := limited && time.Until(deadline) < late
	if s.waiting > 0 || tooLate || s.giveUp == nil {
		return "goes on" + s.doing()
	}
	s.giveUp()
	return "is given up" + s.doing()
}

// run is the one call that starts the pod.
func (m *Manager) run(ctx context.Context, s *start, c PodConfig) {
	defer close(s.done)
	defer m.pool.use()()
	ctx, cancel := operation(ctx, startLimit)
	defer cancel()
	wanted, giveUp := context.WithCancel(ctx)
	defer giveUp()
	go func() {
		select {
		case <-s.unwanted:
			giveUp()
		case <-wanted.Done():
		}
	}()
	if s.err = m.startPod(ctx, wanted, s.birth, c); s.err == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := nameOf(c)
	if m.pods[s.pod.id] == nil {
		delete(m.names, n)
		return
	}
	m.names[n] = started(s.pod) // it could not be undone, and stays until it is removed
}

// started is the start of a pod that is there.
func started(p *Pod) *start {
	s := &start{done: make(chan struct{}), pod: p}
	close(s.done)
	return s
}

// add makes a pod visible.
func (m *Manager) add(p *Pod) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pods[p.id] = p
}

// register makes a pod that was read visible, under its name.
func (m *Manager) register(p *Pod) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pods[p.id] = p
	m.names[nameOf(p.record.now().Config)] = started(p)
}

// forget makes a pod and its name unknown.
func (m *Manager) forget(p *Pod) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.pods, p.id)
	n := nameOf(p.record.now().Config)
	if s, ok := m.names[n]; ok && s.pod == p {
		delete(m.names, n)
	}
}
