package server

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "caisson.sock")
	old := unix.Umask(0)
	defer unix.Umask(old)
	l, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
	// A living daemon keeps its socket.
	if _, err := Listen(t.Context(), path); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), path) {
		t.Errorf("a second daemon: %v", err)
	}
	if conn, err := net.Dial("unix", path); err != nil {
		t.Errorf("the first daemon lost its socket: %v", err)
	} else {
		conn.Close()
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestListenStale(t *testing.T) {
	path := filepath.Join(t.TempDir(), "caisson.sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false) // as kill -9 leaves it
	dead.Close()
	l, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestListenElsewhere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), path); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("over a file: %v", err)
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "precious" {
		t.Errorf("the file is gone: %q, %v", data, err)
	}
	// A socket of another kind belongs to somebody as well.
	datagram := filepath.Join(t.TempDir(), "log")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: datagram, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := Listen(t.Context(), datagram); !errdefs.IsAlreadyExists(err) {
		t.Errorf("over another kind of socket: %v", err)
	}
}
