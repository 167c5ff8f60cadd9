package share

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/vmm/process"
)

func logPath(dir string) string    { return filepath.Join(dir, "log") }
func socketPath(dir string) string { return filepath.Join(dir, "sock") }

// namespaces are those of the process: it shares none with the host but the users' and the cgroups'.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS

// run finds the pod's process, or starts it. The caller has the turn.
func (p *served) run(ctx context.Context) error {
	if p.process != nil {
		if p.died() {
			return fmt.Errorf("the process that serves host directories has died, and another one is being started: %w", errdefs.ErrUnavailable)
		}
		return nil
	}
	found, err := process.Load(folder(p.Dir))
	switch {
	case err == nil:
		p.process = found
		go p.watch(found, pauseMin)
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("find the process that serves host directories: %w", err)
	}
	return p.start(ctx, pauseMin)
}

// died tells whether the process has ended; watch replaces it then. The caller has the turn.
func (p *served) died() bool {
	select {
	case <-p.process.Done():
		return true
	default:
		return false
	}
}

// start starts the process, in a folder that is empty.
func (p *served) start(ctx context.Context, pause time.Duration) error {
	dir := folder(p.Dir)
	err := process.KillIn(ctx, dir) // of a daemon that died over it
	if err == nil {
		err = errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700))
	}
	if err == nil {
		p.process, err = p.launch(dir)
	}
	if err != nil {
		return fmt.Errorf("start the process that serves host directories: %w", err)
	}
	go p.watch(p.process, pause)
	return nil
}

func (p *served) launch(dir string) (*process.Process, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socketPath(dir), Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.SetUnlinkOnClose(false) // it stays, for this daemon and the next
	socket, err := l.File()
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	log, err := os.OpenFile(logPath(dir), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	started, err := process.Start(process.Spec{
		Path: p.program[0], Args: append(slices.Clone(p.program[1:]), p.ID), Dir: dir, Log: log, Files: []*os.File{socket},
		Cgroup: p.Cgroup, Namespaces: namespaces,
	})
	if err != nil {
		return nil, err
	}
	if err := started.Save(dir); err != nil {
		return nil, errors.Join(err, started.Kill(context.Background()))
	}
	return started, nil
}
