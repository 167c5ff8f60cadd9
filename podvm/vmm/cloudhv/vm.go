package cloudhv

import (
	"bytes"
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

type vm struct {
	config vmm.Config
	logs   tail.Pair
	api    *api
	proc   *process.Process
	driver *Driver
	grown  <-chan struct{}
	events eventReader
	ready  chan struct{} // closed when the agent accepts streams
	done   chan struct{} // closed when the VMM is gone, after info.Err was set

	resize sync.Mutex // one resize at a time; held across calls to the VMM, guards nothing else

	mu      sync.Mutex
	info    vmm.Info
	devices map[string]string        // serial -> device id
	removed map[string]chan struct{} // device id -> closed when it is gone
	cause   error                    // why it is about to be killed
}

func newVM(d *Driver, c vmm.Config, p *process.Process, l tail.Pair) (*vm, error) {
	grown, err := d.watcher.add(eventsPath(c.Dir))
	if err != nil {
		return nil, err
	}
	v := &vm{
		config: c, logs: l, api: newAPI(apiPath(c.Dir)), proc: p, driver: d, grown: grown,
		events: eventReader{path: eventsPath(c.Dir)},
		ready:  make(chan struct{}), done: make(chan struct{}),
		info:    vmm.Info{PID: p.PID(), Size: c.Size},
		devices: map[string]string{}, removed: map[string]chan struct{}{},
	}
	if c.Disk != nil {
		v.devices[c.Disk.Serial] = diskID + c.Disk.Serial
	}
	return v, nil
}

// boot starts the guest, cold or as a clone.
func (v *vm) boot(ctx context.Context) error {
	ctx, cancel := v.untilEnd(ctx)
	defer cancel()
	if v.config.Template != "" {
		dir, err := cloneDir(v.config)
		if err != nil {
			return err
		}
		close(v.ready) // the template's agent was, and the clone's is from its first instruction
		return v.api.put(ctx, "vm.restore", map[string]any{"source_url": "file://" + dir, "resume": true}, nil)
	}
	if v.config.MemoryFile != "" {
		if err := makeMemoryFile(v.config.MemoryFile, v.config.Size.Memory); err != nil {
			return err
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: readyPath(v.config.Dir), Net: "unix"})
	if err != nil {
		return fmt.Errorf("listen for the agent: %w", err)
	}
	go v.awaitReady(l)
	if err := v.api.put(ctx, "vm.create", bootConfig(v.config), nil); err != nil {
		return err
	}
	return v.api.put(ctx, "vm.boot", nil, nil)
}

// makeMemoryFile makes the sparse file that a template's memory is in.
func makeMemoryFile(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("memory file: %w", err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return fmt.Errorf("memory file: %w", err)
	}
	return nil
}

// awaitReady waits for the one connection that the agent makes when it accepts streams.
func (v *vm) awaitReady(l *net.UnixListener) {
	defer l.Close()
	defer context.AfterFunc(v.lifetime(), func() { l.Close() })()
	conn, err := l.Accept()
	if err != nil {
		return // the VMM has ended
	}
	conn.Close()
	close(v.ready)
}

// lifetime is a context that ends with the process.
func (v *vm) lifetime() context.Context {
	ctx, cancel := context.WithCancelCause(context.Background())
	go func() {
		<-v.proc.Done()
		cancel(vmm.ErrGone)
	}()
	return ctx
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

// Dial implements vmm.VM: Cloud Hypervisor's hybrid vsock, "CONNECT port" on its unix socket.
// Source: docs/vsock.md of Cloud Hypervisor.
func (v *vm) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	select {
	case <-v.ready:
	case <-v.done:
		return nil, fmt.Errorf("dial the agent: %w", v.goneError())
	case <-ctx.Done():
		return nil, fmt.Errorf("dial the agent: the guest has not come up: %w%s", ctx.Err(), v.logs)
	}
	conn, err := v.connect(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("dial the agent: %w", v.explain(err))
	}
	return conn, nil
}

// Cloud Hypervisor gives the guest two seconds to answer a connection, and then hangs up. A guest that
// was busy, or restored only just now, is asked again, at first sooner than that.
const (
	firstPatience = 500 * time.Millisecond
	hangUp        = 2 * time.Second
)

func (v *vm) connect(ctx context.Context, port uint32) (net.Conn, error) {
	for patience := firstPatience; ; patience *= 2 {
		begin := time.Now()
		conn, err := v.connectOnce(ctx, port, patience)
		unanswered := errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.EOF) && time.Since(begin) >= hangUp
		if !unanswered || ctx.Err() != nil {
			return conn, err
		}
		select {
		case <-v.proc.Done():
			return nil, err
		default:
		}
	}
}

func (v *vm) connectOnce(ctx context.Context, port uint32, patience time.Duration) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", vsockPath(v.config.Dir))
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	if err = conn.SetDeadline(time.Now().Add(patience)); err == nil {
		err = handshake(conn, port)
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if !stop() || err != nil {
		conn.Close()
		return nil, errors.Join(ctx.Err(), err)
	}
	return conn, nil
}

// handshake asks for a port and reads "OK NUMBER\n", byte by byte, because the agent's own bytes may
// follow at once.
func handshake(conn net.Conn, port uint32) error {
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		return err
	}
	var line []byte
	for b := make([]byte, 1); !bytes.HasSuffix(line, []byte("\n")); line = append(line, b[0]) {
		if len(line) > 32 {
			return fmt.Errorf("vsock: unexpected answer %q", line)
		}
		if _, err := io.ReadFull(conn, b); err != nil {
			return fmt.Errorf("vsock: port %d refused: %w", port, err)
		}
	}
	if !bytes.HasPrefix(line, []byte("OK ")) {
		return fmt.Errorf("vsock: unexpected answer %q", line)
	}
	return nil
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

// condemn records why the VM is to be ended; the first reason counts.
func (v *vm) condemn(cause error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.cause == nil {
		v.cause = cause
	}
}

// watch follows the VMM's events to its end.
func (v *vm) watch() {
	for {
		select {
		case <-v.grown:
			if cause := v.readEvents(); cause != nil {
				v.condemn(cause)
				v.proc.Kill(context.Background())
			}
		case <-v.proc.Done():
			if cause := v.readEvents(); cause != nil { // a panic may be the last that it said
				v.condemn(cause)
			}
			v.end()
			return
		}
	}
}

// errPanicked is a cause for which the guest's console has a better text.
var errPanicked = errors.New("the guest's kernel panicked")

// readEvents handles new events; it returns why the VM must end, if it must.
func (v *vm) readEvents() error {
	all, err := v.events.next()
	for _, e := range all {
		switch e.Source + " " + e.Event {
		case "guest panic":
			return errPanicked
		case "vm rebooting", "vm shutdown":
			return errors.New("the guest ended itself")
		case "vm device-removed":
			v.deviceRemoved(e.Properties["id"])
		}
	}
	return err
}

// end makes the VM's end visible.
func (v *vm) end() {
	v.forget()
	words, panicked := v.logs.String(), v.logs.Panic()
	v.logs.Close()
	err := removeFiles(v.config.Dir)
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

// forget gives back what the VM holds of the driver.
func (v *vm) forget() {
	v.driver.watcher.remove(eventsPath(v.config.Dir))
	v.api.close()
}

func (v *vm) goneError() error { return fmt.Errorf("%w: %w", vmm.ErrGone, v.Info().Err) }

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
	case <-v.proc.Done():
		return fmt.Errorf("%w: %w%s", vmm.ErrGone, err, v.logs)
	default:
		return err
	}
}
