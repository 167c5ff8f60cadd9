package podvm

import (
	"io"
	"net"
	"testing"
	"testing/synctest"
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

// forwarded is a connection that is forwarded: its ends at the client and in the pod.
func forwarded() (client, pod net.Conn, ended chan error) {
	host, pod := net.Pipe()
	user, client := net.Pipe()
	ended = make(chan error, 1)
	go func() { ended <- relay(host, halfClosed{user}) }()
	return client, pod, ended
}

// halfClosed is the stream of a client that has said all with a zero, and listens on.
type halfClosed struct{ net.Conn }

func (h halfClosed) Read(b []byte) (int, error) {
	n, err := h.Conn.Read(b)
	if n > 0 && b[n-1] == 0 {
		return n - 1, io.EOF
	}
	return n, err
}

// TestRelayOfSilentPod: a client that has ended keeps nothing of a pod that says nothing.
func TestRelayOfSilentPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, pod, ended := forwarded()
		go io.Copy(io.Discard, pod)
		client.Close()
		began := time.Now()
		select {
		case err := <-ended:
			if err != nil || time.Since(began) != silenceLimit {
				t.Errorf("after %v: %v", time.Since(began), err)
			}
		case <-time.After(time.Hour):
			t.Error("the connection is held")
			pod.Close()
			<-ended
		}
	})
}

// TestRelayAwaitsAnswers: a client that listens on gets what the pod says in time, however slowly it takes it; one
// that has not ended waits for as long as it likes.
func TestRelayAwaitsAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, pod, ended := forwarded()
		go io.Copy(io.Discard, pod)
		say := func(after time.Duration, word string) {
			t.Helper()
			time.Sleep(after)
			if _, err := io.WriteString(pod, word); err != nil {
				t.Fatal(err)
			}
		}
		hear := func(word string) {
			t.Helper()
			b := make([]byte, len(word))
			if _, err := io.ReadFull(client, b); err != nil || string(b) != word {
				t.Errorf("got %q, %v; want %q", b, err, word)
			}
		}
		say(time.Hour, "hello")
		hear("hello")
		client.Write([]byte{'q', 0})
		say(silenceLimit-1, "one")
		time.Sleep(2 * silenceLimit)
		hear("one")
		say(silenceLimit-1, "two")
		hear("two")
		pod.Close()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
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
