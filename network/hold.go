package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"
)

// orphanLimit is how long a plugin may go on whose daemon has died.
const orphanLimit = 10 * time.Second

// plugins returns a libcni whose plugins hold the pod's record, by a lock that is theirs as much as the
// daemon's. A plugin that is killed halfway leaves the node's network half-changed, a bridge without
// an address for one, which no DEL mends; so it outlives a daemon that dies, and whoever calls the
// next one for this pod waits here until it has ended. release must be called when no plugin runs.
func (n *CNI) plugins(ctx context.Context, id string) (lib *libcni.CNIConfig, release func(), err error) {
	f, err := os.Open(n.recordPath(id))
	if errors.Is(err, fs.ErrNotExist) {
		return n.lib, func() {}, nil // nothing was begun for this pod that this daemon did not begin
	}
	if err != nil {
		return nil, nil, fmt.Errorf("network record: %w", err)
	}
	if err := n.lock(ctx, id, f); err != nil {
		f.Close()
		return nil, nil, err
	}
	release = func() {
		// Not by closing: a process that a plugin has left behind has it open, too.
		_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
		f.Close()
	}
	return newLib(n.o, f), release, nil
}

// lock locks the pod's record. Plugins of a former daemon that have it locked for too long are killed.
func (n *CNI) lock(ctx context.Context, id string, f *os.File) error {
	err := flock(f, unix.LOCK_EX|unix.LOCK_NB)
	if !errors.Is(err, unix.EWOULDBLOCK) {
		return err
	}
	slog.InfoContext(ctx, "waiting for a CNI plugin that a former daemon has started", "pod", id)
	locked := make(chan error, 1)
	go func() { locked <- flock(f, unix.LOCK_EX) }()
	limit := time.NewTimer(min(orphanLimit, n.o.Timeout))
	defer limit.Stop()
	select {
	case err := <-locked:
		return err
	case <-limit.C:
	case <-ctx.Done():
	}
	if err := killHolders(f); err != nil {
		return err
	}
	return <-locked
}

func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("lock network record", err)
		}
	}
}

// killHolders kills the other processes that have the file open.
func killHolders(f *os.File) error {
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return err
	}
	fds, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return err
	}
	for _, fd := range fds {
		// One that is gone is nobody's any more.
		if target, err := os.Readlink(fd); err != nil || target != path {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(fd))))
		if err != nil || pid == os.Getpid() {
			continue
		}
		slog.Warn("CNI plugin of a former daemon hangs, killed", "pid", pid, "record", path)
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill CNI plugin %d: %w", pid, err)
		}
	}
	return nil
}
