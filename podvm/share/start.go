package share

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/vmm/process"
)

func logPath(dir string) string    { return filepath.Join(dir, "log") }
func socketPath(dir string) string { return filepath.Join(dir, "sock") }

// namespaces are those of the process: it shares none with the host but the users' and the cgroups'.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS

// run finds the pod's process, or starts it. The caller has the turn.
func (p *served) run(ctx context.Context) error {
	if p.process != nil && !p.died() {
		return nil
	}
	found, err := process.Load(folder(p.Dir))
	if errors.Is(err, fs.ErrNotExist) {
		found, err = p.start(ctx)
	}
	if err != nil {
		return fmt.Errorf("the process that serves host directories: %w", err)
	}
	p.process = found
	go p.watch(found)
	return nil
}

// died tells whether the process has ended. The caller has the turn.
func (p *served) died() bool {
	select {
	case <-p.process.Done():
		return true
	default:
		return false
	}
}

// watch tells when the process dies.
func (p *served) watch(proc *process.Process) {
	select {
	case <-proc.Done():
	case <-p.life.Done():
	}
	if p.life.Err() == nil {
		slog.Error("the process that serves host directories has died: what its pod has open in them is lost", "pod", p.ID, "err", proc.Err(), "log", logPath(folder(p.Dir)))
		p.look()
	}
}

// start starts the process, in a folder that is empty.
func (p *served) start(ctx context.Context) (*process.Process, error) {
	dir := folder(p.Dir)
	// There may be one that a daemon had not noted when it died.
	if err := process.KillIn(ctx, dir); err != nil {
		return nil, err
	}
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
		return nil, err
	}
	for _, r := range p.relays { // of the process before
		r.stop()
	}
	clear(p.relays)
	return p.launch(dir)
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
	// In a cgroup that is full the kernel would take it instead of the VMM, which is what fills it.
	if err := process.SameOOMScore(dir, p.Dir); err != nil {
		slog.Warn("the process that serves host directories is not as expendable as its pod", "pod", p.ID, "err", err)
	}
	return started, nil
}
