package cloudhv

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// api calls Cloud Hypervisor's REST API on its unix socket: the dozen calls in use.
// Source: vmm/src/api/openapi/cloud-hypervisor.yaml of Cloud Hypervisor.
type api struct {
	socket string
	http   *http.Client
}

// replyMax bounds what is read of a reply, in bytes; vm.info of a VM with many devices is the largest.
const replyMax = 4 << 20

func newAPI(socket string) *api {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return &api{socket, &http.Client{Transport: &http.Transport{DialContext: dial, MaxIdleConns: 1}}}
}

func (a *api) close() { a.http.CloseIdleConnections() }

// put calls a PUT endpoint. body and reply may be nil.
func (a *api) put(ctx context.Context, name string, body, reply any) error {
	return a.call(ctx, http.MethodPut, name, body, reply)
}

func (a *api) call(ctx context.Context, method, name string, body, reply any) error {
	request, err := newRequest(ctx, method, name, body)
	if err != nil {
		return err
	}
	response, err := a.http.Do(request)
	if err != nil {
		return fmt.Errorf("cloud hypervisor %s: %w", name, err)
	}
	return finish(name, response, reply)
}

func newRequest(ctx context.Context, method, name string, body any) (*http.Request, error) {
	var content io.Reader = http.NoBody
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("cloud hypervisor %s: %w", name, err)
		}
		content = bytes.NewReader(data)
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://localhost/api/v1/"+name, content)
	if err != nil {
		return nil, fmt.Errorf("cloud hypervisor %s: %w", name, err)
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("Accept", "application/json")
	return request, nil
}

func finish(name string, response *http.Response, reply any) error {
	defer response.Body.Close()
	data, err := io.ReadAll(io.LimitReader(response.Body, replyMax))
	if err != nil {
		return fmt.Errorf("cloud hypervisor %s: %w", name, err)
	}
	if response.StatusCode/100 != 2 {
		return apiError(name, response.StatusCode, data)
	}
	if reply == nil {
		return nil
	}
	if err := json.Unmarshal(data, reply); err != nil {
		return fmt.Errorf("cloud hypervisor %s: reply: %w", name, err)
	}
	return nil
}

// apiError makes one line of the chain of causes that Cloud Hypervisor sends as a JSON list.
func apiError(name string, code int, data []byte) error {
	var chain []string
	text := strings.TrimSpace(string(data))
	if json.Unmarshal(data, &chain) == nil {
		text = strings.Join(chain, ": ")
	}
	kind := error(errdefs.ErrInternal)
	if code == http.StatusNotFound {
		kind = errdefs.ErrNotFound
	}
	return fmt.Errorf("cloud hypervisor %s: %s (%d): %w", name, text, code, kind)
}

// putFile calls a PUT endpoint with a descriptor beside the request, which takes a sendmsg of our own.
func (a *api) putFile(ctx context.Context, name string, body any, f *os.File) error {
	request, err := newRequest(ctx, http.MethodPut, name, body)
	if err != nil {
		return err
	}
	var text bytes.Buffer
	if err := request.Write(&text); err != nil {
		return fmt.Errorf("cloud hypervisor %s: %w", name, err)
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: a.socket, Net: "unix"})
	if err != nil {
		return fmt.Errorf("cloud hypervisor %s: %w", name, err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	n, _, err := conn.WriteMsgUnix(text.Bytes(), unix.UnixRights(int(f.Fd())), nil)
	if err == nil && n < text.Len() {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("cloud hypervisor %s: %w", name, errors.Join(context.Cause(ctx), err))
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), request)
	if err != nil {
		return fmt.Errorf("cloud hypervisor %s: %w", name, errors.Join(context.Cause(ctx), err))
	}
	return finish(name, response, nil)
}
