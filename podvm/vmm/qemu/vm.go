package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/caisson-vm/caisson/internal/serialmux"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
	"github.com/caisson-vm/caisson/podvm/vmm/tail"
)

type vm struct {
	config  vmm.Config
	shape   shape
	proc    *process.Process
	logs    tail.Pair
	control *qmp
	done    chan struct{} // closed when the VMM is gone, after info.Err was set
	doomed  chan struct{} // gets a value when the guest must be ended

	dialing chan struct{} // holds a value while nobody makes the session
	resize  sync.Mutex    // one resize at a time; held across calls to QEMU, guards nothing else

	mu      sync.Mutex
	info    vmm.Info
	disks   map[string]bool          // by serial; false while it is being added
	removed map[string]chan struct{} // device id -> closed when it is gone
	state   chan string              // migration states, while one goes on
	session *serialmux.Session
	again   bool  // the guest may have a session with a former host, or have been cloned in one
	paused  bool  // by us, for a snapshot or until a clone runs
	cause   error // why it ends
}

func newVM(c vmm.Config, s shape, p *process.Process, l tail.Pair) *vm {
	v := &vm{
		config: c, shape: s, proc: p, logs: l,
		done: make(chan struct{}), doomed: make(chan struct{}, 1), dialing: make(chan struct{}, 1),
		info:  vmm.Info{PID: p.PID(), Size: s.Size},
		disks: map[string]bool{}, removed: map[string]chan struct{}{},
	}
	if c.Disk != nil {
		v.disks[c.Disk.Serial] = true
	}
	v.again, v.paused = c.Template != "", c.Template != ""
	v.dialing <- struct{}{}
	return v
}

// untilEnd is ctx, ended by the VMM's end too, with vmm.ErrGone as its cause.
func (v *vm) untilEnd(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := make(chan struct{})
	go func() {
		select {
		case <-v.proc.Done():
			cancel(vmm.ErrGone)
		case <-stop:
		}
	}()
	return ctx, sync.OnceFunc(func() { close(stop); cancel(nil) })
}

func (v *vm) connect(ctx context.Context) (err error) {
	ctx, cancel := v.untilEnd(ctx)
	defer cancel()
	v.control, err = dialQMP(ctx, qmpPath(v.config.Dir), v.event)
	return err
}

func (v *vm) execute(ctx context.Context, command string, arguments, result any) error {
	ctx, cancel := v.untilEnd(ctx)
	defer cancel()
	return v.control.execute(ctx, command, arguments, result)
}

// Dial implements vmm.VM: a stream of the session over the serial port.
func (v *vm) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	ctx, cancel := v.untilEnd(ctx)
	defer cancel()
	s, err := v.channel(ctx)
	if err != nil {
		return nil, fmt.Errorf("dial the agent: %w", v.explain(err))
	}
	conn, err := s.Open(port)
	if err != nil {
		return nil, fmt.Errorf("dial the agent: %w", v.explain(err))
	}
	return conn, nil
}

// channel returns the session; the first caller makes it, and the others wait for that.
func (v *vm) channel(ctx context.Context) (*serialmux.Session, error) {
	select {
	case <-v.dialing:
	case <-ctx.Done():
		return nil, v.noGuest(ctx)
	}
	defer func() { v.dialing <- struct{}{} }()
	if s := v.current(); s != nil {
		return s, nil
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", channelPath(v.config.Dir))
	if err != nil {
		return nil, err
	}
	s, err := serialmux.Dial(ctx, conn, v.again)
	if ctx.Err() != nil {
		return nil, v.noGuest(ctx)
	}
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	v.session, v.again = s, true
	v.mu.Unlock()
	return s, nil
}

// noGuest says why there was no answer: the VMM's end, or the caller's patience.
func (v *vm) noGuest(ctx context.Context) error {
	if errors.Is(context.Cause(ctx), vmm.ErrGone) {
		return vmm.ErrGone
	}
	return fmt.Errorf("the guest has not come up: %w%s", context.Cause(ctx), v.logs)
}

// current is the session, nil if there is none or it has ended.
func (v *vm) current() *serialmux.Session {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.session == nil {
		return nil
	}
	select {
	case <-v.session.Done():
		v.session = nil
	default:
	}
	return v.session
}

// hangUp ends the session, if there is one.
func (v *vm) hangUp() {
	v.mu.Lock()
	s := v.session
	v.session = nil
	v.mu.Unlock()
	if s != nil {
		s.Close()
	}
}

// Info implements vmm.VM.
func (v *vm) Info() vmm.Info {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.info
}

// Done implements vmm.VM.
func (v *vm) Done() <-chan struct{} { return v.done }

// Kill implements vmm.VM.
func (v *vm) Kill(ctx context.Context) error {
	v.condemn(errors.New("killed"))
	if err := v.proc.Kill(ctx); err != nil {
		return err
	}
	select {
	case <-v.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// condemn records why the VM ends; the first reason counts.
func (v *vm) condemn(cause error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.cause == nil {
		v.cause = cause
	}
}

// event handles what QEMU reports.
// Source: qapi/run-state.json, qdev.json, char.json, migration.json of QEMU.
func (v *vm) event(name string, data json.RawMessage) {
	var d struct {
		Device, Status, Reason string
	}
	if json.Unmarshal(data, &d) != nil {
		return
	}
	switch name {
	case "GUEST_PANICKED":
		v.doom(errPanicked)
	case "SHUTDOWN":
		if d.Reason == "guest-panic" {
			v.doom(errPanicked)
		} else {
			v.doom(fmt.Errorf("the guest ended itself (%s)", d.Reason))
		}
	case "STOP":
		v.mu.Lock()
		ours := v.paused
		v.mu.Unlock()
		if !ours { // KVM can't run the guest, or a disk failed
			v.doom(errors.New("QEMU stopped the guest"))
		}
	case "DEVICE_DELETED":
		v.deleted(d.Device)
	case "MIGRATION":
		v.tellMigration(d.Status)
	}
}

// errPanicked is a cause for which the guest's console has a better text.
var errPanicked = errors.New("the guest's kernel panicked")

// doom has the watcher end the VM.
func (v *vm) doom(cause error) {
	v.condemn(cause)
	select {
	case v.doomed <- struct{}{}:
	default:
	}
}

// watch follows the VM to its end.
func (v *vm) watch() {
	select {
	case <-v.doomed:
		v.proc.Kill(context.Background())
	case <-v.proc.Done():
	}
	<-v.proc.Done()
	v.hangUp()
	v.control.close()
	words, panicked := v.logs.String(), v.logs.Panic()
	err := errors.Join(v.logs.Close(), removeFiles(v.config.Dir))
	v.mu.Lock()
	cause := v.cause
	switch cause {
	case errPanicked:
		cause = panicked
	case nil:
		cause = errors.New("the VMM ended by itself")
		if status := v.proc.Err(); status != nil {
			cause = fmt.Errorf("the VMM ended: %w", status)
		}
	}
	v.info.Err = errors.Join(fmt.Errorf("%w%s", cause, words), err)
	v.mu.Unlock()
	close(v.done)
}

// endDelay is how long after its connections a VMM's process may take to end.
const endDelay = 2 * time.Second

// explain adds to an error that the VMM has ended, and what it last said, where that is why.
func (v *vm) explain(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		select {
		case <-v.proc.Done():
		case <-time.After(endDelay):
		}
	}
	select {
	case <-v.done:
		return fmt.Errorf("%w: %w: %w", vmm.ErrGone, v.Info().Err, err)
	case <-v.proc.Done():
		return fmt.Errorf("%w: %w%s", vmm.ErrGone, err, v.logs)
	default:
		return err
	}
}
