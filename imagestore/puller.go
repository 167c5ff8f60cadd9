package imagestore

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/internal/undo"
)

const (
	// pullMemory bounds the process of a pull, in bytes: at the bounds of names and attributes (erofs.Limits) it
	// has some 1.1 GiB resident.
	pullMemory = 2 << 30
	// endLimit bounds how long a process may take to end that has closed its pipe.
	endLimit = 5 * time.Second
	// silenceLimit bounds how long a process may say nothing, which it does every reportEvery.
	silenceLimit = time.Minute
)

// puller is the process of a pull, as the daemon has it.
type puller struct {
	name  name
	dir   string // its own, in the staging directory
	image *os.File
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	pipe  *os.File // below out
	says  head     // to be read once ended
	ended chan struct{}
	gone  atomic.Bool // it was cancelled

	downloaded, unpacked atomic.Int64
	logged               int
}

// startPuller starts the process of a pull, which then waits for a request.
func (s *Store) startPuller(n name) (*puller, error) {
	if len(s.o.Puller) == 0 {
		return nil, fmt.Errorf("this store has no program that pulls: %w", errdefs.ErrFailedPrecondition)
	}
	var u undo.Stack
	defer u.Run()
	p := &puller{name: n, ended: make(chan struct{})}
	var err error
	if p.dir, err = os.MkdirTemp(s.staging, "pull-*"); err != nil {
		return nil, err
	}
	u.Push("remove the files of a pull", func(context.Context) error { return os.RemoveAll(p.dir) })
	if p.image, err = os.OpenFile(p.imagePath(), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600); err != nil {
		return nil, err
	}
	u.Push("close the image's file", func(context.Context) error { return p.image.Close() })
	var theirs *os.File
	if p.pipe, theirs, err = os.Pipe(); err != nil {
		return nil, err
	}
	defer theirs.Close()
	u.Push("close the pipe of a pull", func(context.Context) error { return p.pipe.Close() })
	p.out = bufio.NewReaderSize(p.pipe, maxLine)
	p.cmd = exec.Command(s.o.Puller[0], s.o.Puller[1:]...)
	p.cmd.Stderr, p.cmd.ExtraFiles = &p.says, []*os.File{p.image, theirs}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.cmd.WaitDelay = endLimit // for what the process itself may have started
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	started := make(chan error)
	go p.run(started)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start the process of the pull: %w", err)
	}
	u.Release()
	return p, nil
}

func (p *puller) imagePath() string { return filepath.Join(p.dir, "image") }

// run starts the process and waits for its end.
func (p *puller) run(started chan<- error) {
	runtime.LockOSThread() // the process ends with the thread that has started it
	defer runtime.UnlockOSThread()
	err := p.cmd.Start()
	started <- err
	if err == nil {
		p.cmd.Wait() // how it went is in cmd.ProcessState
	}
	close(p.ended)
}

func (p *puller) kill() { p.cmd.Process.Kill() } // an error says that it has ended

func (p *puller) cancel() {
	p.gone.Store(true)
	p.kill()
}

// end ends the process, after which nobody writes to the image's file any more.
func (p *puller) end() {
	p.kill()
	<-p.ended
}

// close ends the process and removes what is left of it.
func (p *puller) close() {
	p.end()
	p.in.Close()
	p.pipe.Close()
	p.image.Close() // synced, or not needed
	if err := os.RemoveAll(p.dir); err != nil {
		slog.Error("remove the files of a pull", "image", p.name.String(), "err", err)
	}
}

// say sends the process what is v.
func (p *puller) say(v any) error {
	if err := json.NewEncoder(p.in).Encode(v); err != nil {
		return p.broken(err)
	}
	return nil
}

// next returns the next report but those of progress and for the log.
func (p *puller) next() (report, error) {
	for {
		if err := p.pipe.SetReadDeadline(time.Now().Add(silenceLimit)); err != nil {
			return report{}, p.broken(err)
		}
		r, err := readReport(p.out)
		if err != nil {
			return report{}, p.broken(err)
		}
		if err := p.count(r); err != nil {
			return report{}, p.broken(err)
		}
		switch {
		case r.Log != nil:
			p.log(r.Log)
		case r.Failed != nil:
			return report{}, r.Failed.err()
		case r.Found != nil || r.Config != 0 || r.Done:
			return r, nil
		}
	}
}

func (p *puller) log(l *logLine) {
	switch p.logged++; {
	case p.logged <= maxLogged:
		l.log()
	case p.logged == maxLogged+1:
		slog.Warn("a pull has more to say, which is left out", "image", p.name.String())
	}
}

// count takes the bytes that r tells of, which metrics count.
func (p *puller) count(r report) error {
	for _, c := range []struct {
		sum *atomic.Int64
		now int64
	}{{&p.downloaded, r.Downloaded}, {&p.unpacked, r.Unpacked}} {
		if c.now == 0 {
			continue // not told
		}
		if c.now < c.sum.Load() || c.now > 2*maxBytes {
			return fmt.Errorf("%d bytes after %d", c.now, c.sum.Load())
		}
		c.sum.Store(c.now)
	}
	return nil
}

// find returns what the name refers to.
func (p *puller) find() (*found, error) {
	r, err := p.next()
	if err != nil {
		return nil, err
	}
	if r.Found == nil {
		return nil, p.broken(errors.New("another report than of what it has found"))
	}
	if err := r.Found.check(p.name); err != nil {
		return nil, p.broken(err)
	}
	r.Found.name = p.name
	return r.Found, nil
}

// config returns the configuration of what was found.
func (p *puller) config(f *found) ([]byte, *config, error) {
	r, err := p.next()
	if err != nil {
		return nil, nil, err
	}
	if r.Config <= 0 || r.Config > maxConfig {
		return nil, nil, p.broken(errors.New("another report than of a configuration"))
	}
	raw := make([]byte, r.Config)
	if _, err := io.ReadFull(p.out, raw); err != nil {
		return nil, nil, p.broken(err)
	}
	c, err := openConfig(p.name, f.Config, raw)
	return raw, c, err
}

// wait returns when the image's file is complete.
func (p *puller) wait() error {
	r, err := p.next()
	if err != nil {
		return err
	}
	if !r.Done {
		return p.broken(errors.New("another report than of its end"))
	}
	p.end()
	return nil
}

// broken says why there is nothing more to hear of the process. It has ended then.
func (p *puller) broken(err error) error {
	ending := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.EPIPE)
	if ending {
		select {
		case <-p.ended:
		case <-time.After(endLimit):
			ending = false
		}
	}
	p.end()
	state := p.cmd.ProcessState
	status, _ := state.Sys().(syscall.WaitStatus)
	switch {
	case p.gone.Load():
		return err
	case p.says.outOfMemory():
		return fmt.Errorf("what the registry or the image says takes more memory than a pull may have; have the registry checked, or build the image with fewer files: %w", errdefs.ErrResourceExhausted)
	case ending && status.Signal() == syscall.SIGKILL:
		return fmt.Errorf("the process of the pull was killed, as the kernel does where memory lacks; free some and pull again: %w", errdefs.ErrResourceExhausted)
	}
	slog.Error("process of a pull", "image", p.name.String(), "err", err, "state", state.String(), "says", p.says.String())
	return fmt.Errorf("the process of the pull has failed (%s); pull again, and report it with what the daemon's log says: %w", state, errdefs.ErrInternal)
}

// head keeps the beginning of what is written to it.
type head struct{ strings.Builder }

func (h *head) Write(b []byte) (int, error) {
	h.Builder.Write(b[:min(len(b), 4<<10-h.Len())])
	return len(b), nil
}

// outOfMemory tells whether they are the last words of a Go program whose kernel gave it no memory.
func (h *head) outOfMemory() bool {
	return strings.Contains(h.String(), "out of memory") || strings.Contains(h.String(), "cannot allocate memory")
}
