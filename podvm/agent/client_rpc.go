package agent

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// intercept gives the errors of calls their errdefs kinds, and tells the watchdog of them.
func (c *Client) intercept(conn *callConn) ttrpc.UnaryClientInterceptor {
	return func(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, call ttrpc.Invoker) error {
		answered := c.asked()
		err := conn.call(ctx, req, resp, call)
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
}

// rpc is the generated client, but for Watch.
type rpc struct {
	AgentClient
	c *Client
}

// Watch takes a stream of its own, because ttrpc tells a server that a call was given up only by
// the end of its stream. It ends with the context.
func (r rpc) Watch(ctx context.Context, req *WatchRequest) (Agent_WatchClient, error) {
	stream, err := r.c.open(ctx, Header{Kind: KindRPC})
	if err != nil {
		return nil, err
	}
	conn := newWatchConn(stream)
	t := ttrpc.NewClient(conn)
	context.AfterFunc(ctx, func() { t.Close() }) // also where the guest does not read that it is asked
	w, err := NewAgentClient(t).Watch(ctx, req)
	if err != nil {
		t.Close()
		return nil, fromRPC(err)
	}
	return watch{w, t, conn}, nil
}

type watch struct {
	Agent_WatchClient
	t    *ttrpc.Client
	conn *watchConn
}

// Recv returns the next state. After an error, io.EOF among them, the watch has ended.
func (w watch) Recv() (*ContainerState, error) {
	var raw Empty // has no fields: whatever comes is kept as it is
	err := w.RecvMsg(&raw)
	if err == nil {
		var s *ContainerState
		if s, err = parseState(raw.ProtoReflect().GetUnknown()); err == nil {
			w.conn.take()
			return s, nil
		}
	}
	w.t.Close()
	if errors.Is(err, io.EOF) {
		return nil, io.EOF
	}
	return nil, fromRPC(err)
}

// filesField is ContainerState.files.
const filesField = 7

// parseState decodes a message of Watch. Its files are counted before: an empty one takes two bytes here, and
// some sixty times as much to decode.
func parseState(raw []byte) (*ContainerState, error) {
	files := 0
	for b := raw; len(b) > 0; {
		field, _, n := protowire.ConsumeField(b)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		if field == filesField {
			files++
		}
		b = b[n:]
	}
	if files > WrittenFiles {
		return nil, fmt.Errorf("the guest sends %d files of a container, at most %d are awaited", files, WrittenFiles)
	}
	s := new(ContainerState)
	return s, proto.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(raw, s)
}
