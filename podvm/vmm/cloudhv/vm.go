package cloudhv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/machine"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
	"github.com/caisson-vm/caisson/podvm/vmm/tail"
)

type vm struct {
	*machine.VM
	api    *api
	driver *Driver
	grown  <-chan struct{}
	events eventReader
	ready  chan struct{} // closed when the agent accepts streams

	resize sync.Mutex     // one resize at a time; held across calls to the VMM, guards late
	late   bool           // the guest may have gone on to give memory back after nobody waited for it any more
	open   sync.WaitGroup // connections to a guest that is going to be a template
}

func newVM(d *Driver, c vmm.Config, p *process.Process, l tail.Pair) (*vm, error) {
	grown, err := d.watcher.add(eventsPath(c.Dir))
	if err != nil {
		return nil, err
	}
	return &vm{
		VM: machine.New(c, p, l), api: newAPI(apiPath(c.Dir)), driver: d, grown: grown,
		events: eventReader{path: eventsPath(c.Dir)}, ready: make(chan struct{}),
	}, nil
}

// boot starts the guest, cold or as a clone.
func (v *vm) boot(ctx context.Context) error {
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	if v.Config.Template != "" {
		dir, err := cloneDir(v.Config)
		if err != nil {
			return err
		}
		close(v.ready) // the template's agent was, and the clone's is from its first instruction
		return v.restore(ctx, dir)
	}
	if v.Config.MemoryFile != "" {
		if err := makeSparse(v.Config.MemoryFile, v.Config.Size.Memory); err != nil {
			return err
		}
		if err := makeSparse(primerPath(filepath.Dir(v.Config.MemoryFile)), pmemBlock); err != nil {
			return err
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: readyPath(v.Config.Dir), Net: "unix"})
	if err != nil {
		return fmt.Errorf("listen for the agent: %w", err)
	}
	go v.awaitReady(l)
	if err := v.api.put(ctx, "vm.create", bootConfig(v.Config), nil); err != nil {
		return err
	}
	if v.Config.Tap != nil {
		if err := v.api.putFile(ctx, "vm.add-net", netConfig{cardID, vmm.CardMAC}, v.Config.Tap); err != nil {
			return err
		}
	}
	return v.api.put(ctx, "vm.boot", nil, nil)
}

// restore makes the clone whose folder this is, and lets it run.
func (v *vm) restore(ctx context.Context, dir string) (err error) {
	request := restoreConfig{SourceURL: "file://" + dir}
	if v.Config.Tap == nil {
		err = v.api.put(ctx, "vm.restore", request, nil)
	} else {
		request.NetFDs = []netFDs{{cardID, 1}}
		err = v.api.putFile(ctx, "vm.restore", request, v.Config.Tap)
	}
	if err != nil {
		return err
	}
	return v.resume(ctx)
}

// makeSparse makes a file of a template's: of its memory, or of its primer.
func makeSparse(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("file of the template: %w", err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return fmt.Errorf("file of the template: %w", err)
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
		<-v.Process.Done()
		cancel(vmm.ErrGone)
	}()
	return ctx
}

// Dial implements vmm.VM: Cloud Hypervisor's hybrid vsock, "CONNECT port" on its unix socket.
// Source: docs/vsock.md of Cloud Hypervisor.
func (v *vm) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	select {
	case <-v.ready:
	case <-v.Done():
		return nil, fmt.Errorf("dial the agent: %w", v.goneError())
	case <-ctx.Done():
		return nil, fmt.Errorf("dial the agent: the guest has not come up: %w%s", ctx.Err(), v.Logs)
	}
	conn, err := v.connect(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("dial the agent: %w", v.Explain(err))
	}
	if v.Config.MemoryFile != "" {
		v.open.Add(1)
		return &farewell{UnixConn: conn, gone: v.open.Done}, nil
	}
	return conn, nil
}

// farewell is a connection to a guest that is going to be a template: it is gone only when the guest
// has let go of it. One that is in a snapshot is in its clones for ever, and as Cloud Hypervisor
// numbers their connections from the start, they take their own first ones for it.
type farewell struct {
	*net.UnixConn
	once sync.Once
	gone func()
}

// farewellLimit is how long the guest may take.
const farewellLimit = 10 * time.Second

// quiet waits until the guest has let go of all connections.
func (v *vm) quiet(ctx context.Context) error {
	all := make(chan struct{})
	go func() {
		v.open.Wait()
		close(all)
	}()
	select {
	case <-all:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("connections to the guest are open: %w", context.Cause(ctx))
	}
}

// Close tells the guest, whose answer is waited for in the background.
func (f *farewell) Close() error {
	err := net.ErrClosed
	f.once.Do(func() {
		err = errors.Join(f.CloseWrite(), f.SetDeadline(time.Now().Add(farewellLimit)))
		go func() {
			defer f.gone()
			_, _ = io.Copy(io.Discard, f.UnixConn) // whose end, or a guest that is stuck, is what is waited for
			f.UnixConn.Close()
		}()
	})
	return err
}

// Cloud Hypervisor gives the guest two seconds to answer a connection, and then hangs up. A guest that
// was restored only just now may never see its first one, so that soon another is tried beside it. Not
// beside those of a guest that is going to be a template: the ones that lose would be in its snapshot.
//
// A connection that is in a snapshot is one that its clones refuse: they are numbered from the start
// again. The next number may be free.
const (
	firstPatience = 100 * time.Millisecond
	hangUp        = 2 * time.Second
	mostRefusals  = 8
)

// connect opens a connection to the guest's port: the first of its attempts that is answered.
func (v *vm) connect(ctx context.Context, port uint32) (*net.UnixConn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		conn *net.UnixConn
		err  error
	}
	answers := make(chan answer)
	try := func() {
		begin := time.Now()
		conn, err := v.connectOnce(ctx, port)
		if errors.Is(err, io.EOF) && time.Since(begin) >= hangUp {
			return // unanswered
		}
		select {
		case answers <- answer{conn, err}:
		case <-ctx.Done():
			if conn != nil {
				conn.Close()
			}
		}
	}
	patience, refused := firstPatience, 0
	if v.Config.MemoryFile != "" {
		patience = hangUp
	}
	for {
		go try()
		select {
		case a := <-answers:
			if !errors.Is(a.err, io.EOF) || refused == mostRefusals {
				return a.conn, a.err
			}
			refused++
		case <-time.After(patience):
			patience *= 2
		case <-v.Process.Done():
			return nil, io.EOF
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (v *vm) connectOnce(ctx context.Context, port uint32) (*net.UnixConn, error) {
	var d net.Dialer
	dialed, err := d.DialContext(ctx, "unix", vsockPath(v.Config.Dir))
	if err != nil {
		return nil, err
	}
	conn := dialed.(*net.UnixConn)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	err = handshake(conn, port)
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

// panicDelay is how long a guest whose kernel panicked may take to write why to its console. That comes after the
// event where another processor, or what the panic interrupted, was writing there.
const panicDelay = 500 * time.Millisecond

// watch follows the VMM's events to its end.
func (v *vm) watch() {
	var silent <-chan time.Time
	for {
		select {
		case <-v.grown:
			cause := v.readEvents()
			if cause == nil {
				continue
			}
			v.Condemn(cause)
			if cause == machine.ErrPanicked {
				if silent == nil { // a guest can say so again and again
					silent = time.After(panicDelay)
				}
				continue
			}
			v.Process.Kill(context.Background())
		case <-silent:
			v.Process.Kill(context.Background())
		case <-v.Process.Done():
			if cause := v.readEvents(); cause != nil { // a panic may be the last that it said
				v.Condemn(cause)
			}
			v.end()
			return
		}
	}
}

// readEvents handles new events; it returns why the VM must end, if it must.
func (v *vm) readEvents() error {
	all, err := v.events.next()
	for _, e := range all {
		switch e.Source + " " + e.Event {
		case "guest panic":
			return machine.ErrPanicked
		case "vm rebooting", "vm shutdown":
			return errors.New("the guest ended itself")
		case "vm device-removed":
			v.Left(e.Properties["id"])
		}
	}
	return err
}

// end makes the VM's end visible.
func (v *vm) end() {
	v.forget()
	v.End(func() error { return removeFiles(v.Config.Dir) })
}

// forget gives back what the VM holds of the driver.
func (v *vm) forget() {
	v.driver.watcher.remove(eventsPath(v.Config.Dir))
	v.api.close()
}

func (v *vm) goneError() error { return fmt.Errorf("%w: %w", vmm.ErrGone, v.Info().Err) }
