package agent

import (
	"context"
	"errors"
	"io"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"
)

// intercept gives the errors of calls their errdefs kinds, and tells the watchdog of them.
func (c *Client) intercept(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, call ttrpc.Invoker) error {
	answered := c.asked()
	err := call(ctx, req, resp)
	if ctx.Err() == nil { // else who asked has given up, and nobody knows
		answered()
	}
	if err != nil {
		return fromRPC(err)
	}
	if resp.Status != nil && resp.Status.Code != 0 {
		return fromRPC(status.ErrorProto(resp.Status))
	}
	return nil
}

// rpc is the generated client, but for Watch.
type rpc struct {
	AgentClient
	c *Client
}

// Watch takes a stream of its own, because ttrpc tells a server that a call was given up only by
// the end of its stream. It ends with the context.
func (r rpc) Watch(ctx context.Context, req *WatchRequest) (Agent_WatchClient, error) {
	t, err := r.c.dialRPC(ctx, nil)
	if err != nil {
		return nil, err
	}
	w, err := NewAgentClient(t).Watch(ctx, req)
	if err != nil {
		t.Close()
		return nil, fromRPC(err)
	}
	context.AfterFunc(ctx, func() { t.Close() })
	return watch{w, t}, nil
}

type watch struct {
	Agent_WatchClient
	t *ttrpc.Client
}

// Recv returns the next state. After an error, io.EOF among them, the watch has ended.
func (w watch) Recv() (*ContainerState, error) {
	s, err := w.Agent_WatchClient.Recv()
	if err == nil {
		return s, nil
	}
	w.t.Close()
	if errors.Is(err, io.EOF) {
		return nil, io.EOF
	}
	return nil, fromRPC(err)
}
