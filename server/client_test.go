package server

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/caisson-vm/caisson/podvm"
	"github.com/caisson-vm/caisson/podvm/agent"
)

// dialStream connects to a URL that was handed out, by a connection that can be ended without a word.
func dialStream(t *testing.T, url, protocol string) (net.Conn, httpstream.Connection) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = http.Header{
		httpstream.HeaderConnection: {httpstream.HeaderUpgrade}, httpstream.HeaderUpgrade: {spdy.HeaderSpdy31},
		httpstream.HeaderProtocolVersion: {protocol},
	}
	conn, err := net.Dial("tcp", req.URL.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := req.Write(conn); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	if resp, err := http.ReadResponse(r, req); err != nil || resp.StatusCode != http.StatusSwitchingProtocols || r.Buffered() > 0 {
		t.Fatal(resp, err)
	}
	streams, err := spdy.NewClientConnection(conn)
	if err != nil {
		t.Fatal(err)
	}
	return conn, streams
}

// TestClientGone: what a client has asked for ends with its connection, also where the pod says nothing, and reads
// nothing of what the client has said.
func TestClientGone(t *testing.T) {
	d := start(t)
	pod, container := d.running(t)
	began, ended := make(chan struct{}), make(chan struct{})
	silent := func(ctx context.Context) error {
		began <- struct{}{}
		<-ctx.Done()
		ended <- struct{}{}
		return ctx.Err()
	}
	d.pods.containers[0].exec = func(ctx context.Context, _ podvm.ExecConfig, _ agent.IO) (int32, error) { return 0, silent(ctx) }
	d.pods.containers[0].attach = func(ctx context.Context, _ agent.IO) error { return silent(ctx) }
	d.pods.pods[0].forward = func(ctx context.Context, _ io.ReadWriteCloser) error { return silent(ctx) }
	c := cri.NewRuntimeServiceClient(d.conn)
	exec := func() string {
		return must(c.Exec(t.Context(), &cri.ExecRequest{ContainerId: container, Cmd: []string{"sleep"}, Stdin: true, Stdout: true}))(t).GetUrl()
	}
	attach := func() string {
		return must(c.Attach(t.Context(), &cri.AttachRequest{ContainerId: container, Stdin: true, Stdout: true}))(t).GetUrl()
	}
	forward := func() string {
		return must(c.PortForward(t.Context(), &cri.PortForwardRequest{PodSandboxId: pod}))(t).GetUrl()
	}
	for _, one := range []struct {
		what     string
		url      string
		protocol string
		streams  []string // the last one is written to
		words    int
	}{
		{"exec", exec(), "v4.channel.k8s.io", []string{"error", "stdout", "stdin"}, 0},
		{"exec that is not read", exec(), "v4.channel.k8s.io", []string{"error", "stdout", "stdin"}, 200},
		{"attach", attach(), "v4.channel.k8s.io", []string{"error", "stdout", "stdin"}, 0},
		{"port-forward", forward(), "portforward.k8s.io", []string{"error", "data"}, 0},
		{"port-forward that is not read", forward(), "portforward.k8s.io", []string{"error", "data"}, 200}, // the library reads 50 ahead
	} {
		conn, streams := dialStream(t, one.url, one.protocol)
		var last httpstream.Stream
		for _, kind := range one.streams {
			last = open(t, streams, "streamType", kind, "port", "80", "requestID", "0")
		}
		<-began
		for range one.words {
			if _, err := last.Write([]byte{1}); err != nil {
				t.Fatal(err)
			}
		}
		conn.Close()
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s goes on", one.what)
		}
	}
}
