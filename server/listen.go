package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// probeLimit bounds how long a socket that is already there may take to show that it is alive.
const probeLimit = 2 * time.Second

// Listen makes the unix socket at path, for its owner alone (mode 0600), and its folder where that
// is missing. A socket left behind by a dead daemon is replaced; one on which somebody answers is
// errdefs.ErrAlreadyExists, anything else at path errdefs.ErrFailedPrecondition. Closing the
// listener removes the socket.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	folder := filepath.Dir(path)
	if err := os.MkdirAll(folder, 0o711); err != nil {
		return nil, fmt.Errorf("folder of the socket: %w", err)
	}
	// Two daemons that start at once must not take each other's fresh socket for a stale one.
	lock, err := os.Open(folder)
	if err != nil {
		return nil, fmt.Errorf("folder of the socket: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock %s: %w", folder, err)
	}
	if err := clearStale(ctx, path); err != nil {
		return nil, err
	}
	private := net.ListenConfig{Control: ownerOnly}
	l, err := private.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

// ownerOnly sets the mode that the socket's file will have from its first moment.
func ownerOnly(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); e != nil {
		return e
	}
	return err
}

// clearStale removes the socket of a daemon that is gone.
func clearStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at %s: %w", path, err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is there and is no socket; remove it or listen elsewhere: %w", path, errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		conn.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("another daemon listens on %s; stop it or listen elsewhere: %w", path, errdefs.ErrAlreadyExists)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove stale socket: %w", err)
	}
	return nil
}
