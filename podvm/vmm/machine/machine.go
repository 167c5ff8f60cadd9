// Package machine is what VMs of all drivers have in common on the host: a VMM process with its logs,
// devices that come and go, and an end with a reason.
package machine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
	"github.com/caisson-vm/caisson/podvm/vmm/tail"
)

// VM is a part of a driver's VM. Its methods may be called concurrently.
type VM struct {
	Config  vmm.Config
	Process *process.Process
	Logs    tail.Pair

	done chan struct{} // closed when the VMM is gone, after info.Err was set

	mu      sync.Mutex
	info    vmm.Info
	cause   error                    // why it ends
	devices map[string]string        // disks: serial -> device id
	leaving map[string]chan struct{} // device id -> closed when it is gone
}

// New is the VM of a process that runs.
func New(c vmm.Config, p *process.Process, l tail.Pair) *VM {
	v := &VM{
		Config: c, Process: p, Logs: l, done: make(chan struct{}), info: vmm.Info{PID: p.PID(), Size: c.Size},
		devices: map[string]string{}, leaving: map[string]chan struct{}{},
	}
	if c.Disk != nil {
		v.devices[c.Disk.Serial] = DiskID(c.Disk.Serial)
	}
	return v
}

// Info implements vmm.VM.
func (v *VM) Info() vmm.Info {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.info
}

// SetSize notes what the VM has; the change is made to what was noted before.
func (v *VM) SetSize(change func(*vmm.Size)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	change(&v.info.Size)
}

// Done implements vmm.VM.
func (v *VM) Done() <-chan struct{} { return v.done }

// Kill implements vmm.VM.
func (v *VM) Kill(ctx context.Context) error {
	v.Condemn(errors.New("killed"))
	if err := v.Process.Kill(ctx); err != nil {
		return err
	}
	select {
	case <-v.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ErrPanicked is a cause for which the guest's console has better words.
var ErrPanicked = errors.New("the guest's kernel panicked")

// Condemn records why the VM ends; the first reason counts.
func (v *VM) Condemn(cause error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.cause == nil {
		v.cause = cause
	}
}

// End makes the end of a VM whose process has ended visible. What remove could not remove is told, too.
func (v *VM) End(remove func() error) {
	words, panicked := v.Logs.String(), v.Logs.Panic()
	err := errors.Join(v.Logs.Close(), remove())
	v.mu.Lock()
	cause := v.cause
	switch cause {
	case ErrPanicked:
		cause = panicked
	case nil:
		cause = v.ended()
	}
	v.info.Err = errors.Join(fmt.Errorf("%w%s", cause, words), err)
	v.mu.Unlock()
	close(v.done)
}

// ended is how the VMM's process ended.
func (v *VM) ended() error {
	if status := v.Process.Err(); status != nil {
		return fmt.Errorf("the VMM ended: %w", status)
	}
	return errors.New("the VMM ended by itself")
}

// UntilEnd is ctx, ended by the VMM's end too, with vmm.ErrGone as its cause.
func (v *VM) UntilEnd(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := make(chan struct{})
	go func() {
		select {
		case <-v.Process.Done():
			cancel(vmm.ErrGone)
		case <-stop:
		}
	}()
	return ctx, sync.OnceFunc(func() { close(stop); cancel(nil) })
}

// endDelay is how long after its connections a VMM's process may take to end.
const endDelay = 2 * time.Second

// Explain adds to an error that the VMM has ended, and what it last said, where that is why.
func (v *VM) Explain(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		select {
		case <-v.Process.Done():
		case <-time.After(endDelay):
		}
	}
	select {
	case <-v.done:
		return fmt.Errorf("%w: %w: %w", vmm.ErrGone, v.Info().Err, err)
	case <-v.Process.Done():
		return fmt.Errorf("%w: %w: %w%s", vmm.ErrGone, v.ended(), err, v.Logs)
	default:
		return err
	}
}

// Listen makes a unix socket for a VMM that is about to start. Its name stays when it is closed here.
func Listen(path string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	return l.File()
}
