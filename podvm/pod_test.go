package podvm

import (
	"io"
	"net"
	"testing"
	"time"
)

// TestRelayEnds: a pod that has said all, and does not read, leaves nothing of a forwarded connection.
func TestRelayEnds(t *testing.T) {
	host, guest := pair(t)
	client, user := net.Pipe()
	defer client.Close()
	ended := make(chan error, 1)
	go func() { ended <- relay(host, user) }()
	go io.Copy(client, endless{})
	if err := guest.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the connection is held")
	}
}

// endless has more to say than any buffer takes.
type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

// pair is a connection to a guest, which does not read.
func pair(t *testing.T) (host, guest *net.UnixConn) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: t.TempDir() + "/s", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	host, err = net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	guest, err = l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close(); guest.Close() })
	return host, guest
}
