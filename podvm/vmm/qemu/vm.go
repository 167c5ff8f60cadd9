package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/caisson-vm/caisson/internal/serialmux"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/machine"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
	"github.com/caisson-vm/caisson/podvm/vmm/tail"
)

type vm struct {
	*machine.VM
	shape   shape
	control *qmp
	doomed  chan struct{} // gets a value when the guest must be ended

	dialing chan struct{} // holds a value while nobody makes the session
	resize  sync.Mutex    // one resize at a time; held across calls to QEMU, guards nothing else

	mu      sync.Mutex
	state   chan string // migration states, while one goes on
	session *serialmux.Session
	again   bool // the guest may have a session with a former host, or have been cloned in one
	paused  bool // by us, for a snapshot or until a clone runs
}

func newVM(c vmm.Config, s shape, p *process.Process, l tail.Pair) *vm {
	v := &vm{
		VM: machine.New(c, p, l), shape: s, doomed: make(chan struct{}, 1), dialing: make(chan struct{}, 1),
		again: c.Template != "", paused: c.Template != "",
	}
	v.SetSize(func(size *vmm.Size) { *size = s.Size })
	v.dialing <- struct{}{}
	return v
}

func (v *vm) connect(ctx context.Context) (err error) {
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	v.control, err = dialQMP(ctx, qmpPath(v.Config.Dir), v.event)
	return err
}

func (v *vm) execute(ctx context.Context, command string, arguments, result any) error {
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	return v.control.execute(ctx, command, arguments, result)
}

// Dial implements vmm.VM: a stream of the session over the serial port.
func (v *vm) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	s, err := v.channel(ctx)
	if err != nil {
		return nil, fmt.Errorf("dial the agent: %w", v.Explain(err))
	}
	conn, err := s.Open(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("dial the agent: %w", v.Explain(err))
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
	conn, err := d.DialContext(ctx, "unix", channelPath(v.Config.Dir))
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
	return fmt.Errorf("the guest has not come up: %w%s", context.Cause(ctx), v.Logs)
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
		v.doom(machine.ErrPanicked)
	case "SHUTDOWN":
		if d.Reason == "guest-panic" {
			v.doom(machine.ErrPanicked)
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
		v.Left(d.Device)
	case "MIGRATION":
		v.tellMigration(d.Status)
	}
}

// doom has the watcher end the VM.
func (v *vm) doom(cause error) {
	v.Condemn(cause)
	select {
	case v.doomed <- struct{}{}:
	default:
	}
}

// watch follows the VM to its end.
func (v *vm) watch() {
	select {
	case <-v.doomed:
		v.Process.Kill(context.Background())
	case <-v.Process.Done():
	}
	<-v.Process.Done()
	v.hangUp()
	v.control.close()
	v.End(func() error { return removeFiles(v.Config.Dir) })
}
