package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/net/websocket"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/caisson-vm/caisson/podvm"
	"github.com/caisson-vm/caisson/podvm/agent"
)

// shell is what the fake containers run: it echoes stdin, tells its arguments on stderr and its
// window on stdout, and ends with the code that its last argument says.
func shell(ctx context.Context, c podvm.ExecConfig, stdio agent.IO) (int32, error) {
	var code int32
	fmt.Sscan(c.Command[len(c.Command)-1], &code)
	if stdio.Resize != nil && c.TTY {
		select {
		case size := <-stdio.Resize:
			fmt.Fprintf(stdio.Stdout, "%dx%d\n", size.Width, size.Height)
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	if stdio.Stderr != nil {
		fmt.Fprintln(stdio.Stderr, strings.Join(c.Command, " "))
	}
	if stdio.Stdin == nil {
		fmt.Fprintln(stdio.Stdout, "no stdin")
		return code, nil
	}
	_, err := io.Copy(stdio.Stdout, stdio.Stdin)
	return code, err
}

// connect opens a SPDY connection to a URL that was handed out.
func connect(t *testing.T, url, protocol string) httpstream.Connection {
	t.Helper()
	rt, err := spdy.NewRoundTripper(nil)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(httpstream.HeaderProtocolVersion, protocol)
	resp, err := rt.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	conn, err := rt.NewConnection(resp)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func open(t *testing.T, conn httpstream.Connection, headers ...string) httpstream.Stream {
	t.Helper()
	h := http.Header{}
	for i := 0; i < len(headers); i += 2 {
		h.Set(headers[i], headers[i+1])
	}
	s, err := conn.CreateStream(h)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func read(t *testing.T, r io.Reader) string {
	t.Helper()
	data, err := io.ReadAll(r)
	if err != nil {
		t.Error(err)
	}
	return string(data)
}

// readReset reads what comes before a stream ends or is reset: the library resets after an error.
func readReset(r io.Reader) string {
	data := make([]byte, 4096)
	n, _ := io.ReadFull(r, data)
	return string(data[:n])
}

// exitCode reads the end of a remote command as kubectl does.
func exitCode(t *testing.T, text string) string {
	t.Helper()
	var s struct {
		Status  string
		Message string
		Details struct {
			Causes []struct{ Reason, Message string }
		}
	}
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	if s.Status == "Success" {
		return "0"
	}
	for _, c := range s.Details.Causes {
		if c.Reason == "ExitCode" {
			return c.Message
		}
	}
	return s.Message
}

func TestExecBySPDY(t *testing.T) {
	d := start(t)
	_, container := d.running(t)
	d.pods.containers[0].exec = shell
	c := cri.NewRuntimeServiceClient(d.conn)
	r := must(c.Exec(t.Context(), &cri.ExecRequest{ContainerId: container[:8], Cmd: []string{"sh", "7"}, Stdin: true, Stdout: true, Stderr: true}))(t)
	if !strings.HasPrefix(r.GetUrl(), "http://127.0.0.1:") {
		t.Errorf("url %s", r.GetUrl())
	}
	conn := connect(t, r.GetUrl(), "v4.channel.k8s.io")
	status := open(t, conn, "streamType", "error")
	stdin, stdout, stderr := open(t, conn, "streamType", "stdin"), open(t, conn, "streamType", "stdout"), open(t, conn, "streamType", "stderr")
	big := strings.Repeat("0123456789abcdef", 1<<14)
	go func() {
		io.Copy(stdin, strings.NewReader(big))
		stdin.Close() // half-close: the output must still come
	}()
	if got := read(t, stdout); got != big {
		t.Errorf("stdout: %d bytes; want %d", len(got), len(big))
	}
	if got := read(t, stderr); got != "sh 7\n" {
		t.Errorf("stderr: %q", got)
	}
	if got := exitCode(t, read(t, status)); got != "7" {
		t.Errorf("exit code %s", got)
	}
	// The URL was good for one use.
	resp, err := http.Post(r.GetUrl(), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("a used URL: %s", resp.Status)
	}
}

func TestExecResize(t *testing.T) {
	d := start(t)
	_, container := d.running(t)
	d.pods.containers[0].exec = shell
	c := cri.NewRuntimeServiceClient(d.conn)
	r := must(c.Exec(t.Context(), &cri.ExecRequest{ContainerId: container, Cmd: []string{"sh"}, Tty: true, Stdout: true}))(t)
	conn := connect(t, r.GetUrl(), "v4.channel.k8s.io")
	status, stdout, resize := open(t, conn, "streamType", "error"), open(t, conn, "streamType", "stdout"), open(t, conn, "streamType", "resize")
	fmt.Fprint(resize, `{"Width":120,"Height":40}`)
	if got := read(t, stdout); got != "120x40\nno stdin\n" {
		t.Errorf("stdout: %q", got)
	}
	if got := exitCode(t, read(t, status)); got != "0" {
		t.Errorf("exit code %s", got)
	}
}

func TestExecByWebSocket(t *testing.T) {
	d := start(t)
	_, container := d.running(t)
	d.pods.containers[0].exec = shell
	c := cri.NewRuntimeServiceClient(d.conn)
	r := must(c.Exec(t.Context(), &cri.ExecRequest{ContainerId: container, Cmd: []string{"sh", "3"}, Stdout: true, Stderr: true}))(t)
	config, err := websocket.NewConfig(strings.Replace(r.GetUrl(), "http:", "ws:", 1), "http://127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	config.Protocol = []string{"v4.channel.k8s.io"}
	ws, err := config.DialContext(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	channels := map[byte]string{}
	for {
		var frame []byte
		if err := websocket.Message.Receive(ws, &frame); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		channels[frame[0]] += string(frame[1:])
	}
	if channels[1] != "no stdin\n" || channels[2] != "sh 3\n" || exitCode(t, channels[3]) != "3" {
		t.Errorf("channels: %q", channels)
	}
}

func TestAttach(t *testing.T) {
	d := start(t)
	_, container := d.running(t)
	d.pods.containers[0].attach = func(_ context.Context, stdio agent.IO) error {
		line := make([]byte, 5)
		if _, err := io.ReadFull(stdio.Stdin, line); err != nil {
			return err
		}
		_, err := stdio.Stdout.Write(bytes.ToUpper(line))
		return err
	}
	c := cri.NewRuntimeServiceClient(d.conn)
	r := must(c.Attach(t.Context(), &cri.AttachRequest{ContainerId: container, Stdin: true, Stdout: true}))(t)
	conn := connect(t, r.GetUrl(), "v4.channel.k8s.io")
	status, stdin, stdout := open(t, conn, "streamType", "error"), open(t, conn, "streamType", "stdin"), open(t, conn, "streamType", "stdout")
	fmt.Fprint(stdin, "hello")
	if got := read(t, stdout); got != "HELLO" {
		t.Errorf("stdout: %q", got)
	}
	if got := exitCode(t, read(t, status)); got != "0" {
		t.Errorf("end: %s", got)
	}
}

func TestPortForward(t *testing.T) {
	d := start(t)
	pod, _ := d.running(t)
	c := cri.NewRuntimeServiceClient(d.conn)
	r := must(c.PortForward(t.Context(), &cri.PortForwardRequest{PodSandboxId: pod[:8]}))(t)
	conn := connect(t, r.GetUrl(), "portforward.k8s.io")
	forward := func(id, port string) (data, failed httpstream.Stream) {
		failed = open(t, conn, "streamType", "error", "port", port, "requestID", id)
		return open(t, conn, "streamType", "data", "port", port, "requestID", id), failed
	}
	data, failed := forward("0", "8080")
	fmt.Fprint(data, "ping")
	data.Close()
	if got := read(t, data); got != "port 8080\nping" {
		t.Errorf("data: %q", got)
	}
	if got := read(t, failed); got != "" {
		t.Errorf("error: %q", got)
	}
	// A forward that fails at once may reset its data stream before the client has it.
	fail := func(id, port string) (failed httpstream.Stream) {
		failed = open(t, conn, "streamType", "error", "port", port, "requestID", id)
		conn.CreateStream(http.Header{"Streamtype": {"data"}, "Port": {port}, "Requestid": {id}})
		return failed
	}
	failed = fail("1", "1")
	if got := readReset(failed); !strings.Contains(got, "connection refused") {
		t.Errorf("a refused port: %q", got)
	}
	failed = fail("2", "2") // a panic in this goroutine would end the daemon
	if got := readReset(failed); !strings.Contains(got, "error of its own") {
		t.Errorf("a panic: %q", got)
	}
	must(c.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: pod}))(t)
	_, err := c.PortForward(t.Context(), &cri.PortForwardRequest{PodSandboxId: pod})
	wantCode(t, err, codes.FailedPrecondition)
	_, err = c.PortForward(t.Context(), &cri.PortForwardRequest{PodSandboxId: pod, Port: []int32{70000}})
	wantCode(t, err, codes.InvalidArgument)
}

func TestStreamRefuses(t *testing.T) {
	d := start(t)
	_, container := d.running(t)
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)
	for name, r := range map[string]*cri.ExecRequest{
		"no command":     {ContainerId: container, Stdout: true},
		"no streams":     {ContainerId: container, Cmd: []string{"ls"}},
		"tty and stderr": {ContainerId: container, Cmd: []string{"ls"}, Tty: true, Stdout: true, Stderr: true},
		"NUL":            {ContainerId: container, Cmd: []string{"l\x00s"}, Stdout: true},
	} {
		if _, err := c.Exec(ctx, r); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	must(c.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: container}))(t)
	for name, err := range map[string]error{
		"exec":      second(c.Exec(ctx, &cri.ExecRequest{ContainerId: container, Cmd: []string{"ls"}, Stdout: true})),
		"exec sync": second(c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: container, Cmd: []string{"ls"}})),
		"attach":    second(c.Attach(ctx, &cri.AttachRequest{ContainerId: container, Stdout: true})),
	} {
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "exited") {
			t.Errorf("%s in a stopped container: %v", name, err)
		}
	}
}

func TestExecSync(t *testing.T) {
	d := start(t)
	_, container := d.running(t)
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)
	d.pods.containers[0].exec = shell
	r := must(c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: container, Cmd: []string{"sh", "5"}}))(t)
	if string(r.GetStdout()) != "no stdin\n" || string(r.GetStderr()) != "sh 5\n" || r.GetExitCode() != 5 {
		t.Errorf("%v", r)
	}
	// Too much output is cut, and the command goes on to its end.
	d.pods.containers[0].exec = func(_ context.Context, _ podvm.ExecConfig, stdio agent.IO) (int32, error) {
		chunk := bytes.Repeat([]byte("x"), 1<<20)
		for range 12 {
			stdio.Stdout.Write(chunk)
			if n, err := stdio.Stderr.Write(chunk); n != len(chunk) || err != nil {
				return 1, err
			}
		}
		return 0, nil
	}
	r = must(c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: container, Cmd: []string{"yes"}}))(t)
	if n := len(r.GetStdout()) + len(r.GetStderr()); n != maxOutput {
		t.Errorf("%d bytes of output; want %d", n, maxOutput)
	}
	d.pods.containers[0].exec = func(context.Context, podvm.ExecConfig, agent.IO) (int32, error) {
		return 0, fmt.Errorf("exec: %w", io.ErrUnexpectedEOF)
	}
	_, err := c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: container, Cmd: []string{"sh"}})
	wantCode(t, err, codes.Unknown)
	d.pods.containers[0].exec = func(context.Context, podvm.ExecConfig, agent.IO) (int32, error) {
		return 0, fmt.Errorf("exec: no such command: %w", errdefs.ErrNotFound)
	}
	_, err = c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: container, Cmd: []string{"nope"}})
	wantCode(t, err, codes.InvalidArgument)
}

// TestExecSyncTimeout: by DeadlineExceeded the kubelet knows that a probe timed out.
func TestExecSyncTimeout(t *testing.T) {
	d := start(t)
	_, container := d.running(t)
	killed := make(chan struct{})
	d.pods.containers[0].exec = func(ctx context.Context, _ podvm.ExecConfig, _ agent.IO) (int32, error) {
		<-ctx.Done()
		close(killed)
		return 0, fmt.Errorf("exec: the stream is gone: %w", io.EOF)
	}
	_, _, err := d.kubelet(t, false).ExecSync(t.Context(), container, []string{"sleep", "60"}, time.Second)
	if err == nil || !strings.Contains(err.Error(), "timed out after 1s") {
		t.Errorf("the kubelet sees %v", err)
	}
	<-killed
}
