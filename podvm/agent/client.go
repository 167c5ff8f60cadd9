package agent

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
)

// ClockStep is from where on a guest's wall clock is corrected at once, and not gradually.
const ClockStep = 500 * time.Millisecond

// agentPort is vmm.AgentPort.
const agentPort = 1024

// Dialer opens byte streams to the agent of one VM, as vmm.VM does.
type Dialer interface {
	Dial(ctx context.Context, port uint32) (net.Conn, error)
}

// Client talks to the agent of one VM. It dials when it is first used, and again when its stream of
// RPCs broke. Errors are of errdefs kinds; ErrUnavailable where the stream itself failed. What
// comes from the guest is bounded and checked. Its methods may be called concurrently.
type Client struct {
	dialer Dialer
	// turn holds one token: who has it may dial for the RPCs.
	turn chan struct{}
	dog  atomic.Pointer[watchdog]

	mu     sync.Mutex
	rpc    *ttrpc.Client
	closed bool
}

// NewClient returns a client that dials with d.
func NewClient(d Dialer) *Client {
	c := &Client{dialer: d, turn: make(chan struct{}, 1)}
	c.turn <- struct{}{}
	return c
}

// RPC returns the agent's service. It dials if there is no stream for it, or if it broke. What it
// returns serves for several calls, until one fails with ErrUnavailable.
func (c *Client) RPC(ctx context.Context) (AgentClient, error) {
	t, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	return rpc{NewAgentClient(t), c}, nil
}

func (c *Client) connect(ctx context.Context) (*ttrpc.Client, error) {
	select {
	case <-c.turn:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { c.turn <- struct{}{} }()
	if t, err := c.current(); t != nil || err != nil {
		return t, err
	}
	return c.dialCalls(ctx)
}

func (c *Client) current() (*ttrpc.Client, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, fmt.Errorf("the client of the agent is closed: %w", errdefs.ErrUnavailable)
	}
	return c.rpc, nil
}

func (c *Client) keep(t *ttrpc.Client) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		t.Close()
		return fmt.Errorf("the client of the agent is closed: %w", errdefs.ErrUnavailable)
	}
	c.rpc = t
	return nil
}

// drop forgets a broken stream.
func (c *Client) drop(t *ttrpc.Client) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rpc == t {
		c.rpc = nil
	}
}

// dialCalls opens the stream for calls, and keeps its client until it breaks.
func (c *Client) dialCalls(ctx context.Context) (*ttrpc.Client, error) {
	stream, err := c.open(ctx, Header{Kind: KindRPC})
	if err != nil {
		return nil, err
	}
	conn, kept := newCallConn(stream), make(chan *ttrpc.Client, 1)
	t := ttrpc.NewClient(conn, ttrpc.WithUnaryClientInterceptor(c.intercept(conn)), ttrpc.WithOnClose(func() { c.drop(<-kept) }))
	err = c.keep(t)
	kept <- t // it may have broken already
	return t, err
}

// Close ends the RPCs' stream. Other streams go on until they are closed themselves.
func (c *Client) Close() error {
	c.mu.Lock()
	t := c.rpc
	c.rpc, c.closed = nil, true
	c.mu.Unlock()
	if t == nil {
		return nil
	}
	return t.Close()
}

// open is dial, under the eyes of the watchdog.
func (c *Client) open(ctx context.Context, h Header) (net.Conn, error) {
	answered := c.asked()
	conn, err := c.dial(ctx, h)
	if ctx.Err() == nil {
		answered()
	}
	return conn, err
}

// dial dials a stream, sends its header and awaits the agent's reply.
func (c *Client) dial(ctx context.Context, h Header) (net.Conn, error) {
	conn, err := c.dialer.Dial(ctx, agentPort)
	if err != nil {
		return nil, fmt.Errorf("dial the agent: %w", err)
	}
	if _, err := Handshake(ctx, conn, h); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// Handshake sends a stream's header and awaits the agent's reply, until ctx ends. The error is the guest's,
// if it refuses, or ErrUnavailable where the stream broke; after any of them the caller closes the stream,
// on which what a guest does not read may still wait to be written.
func Handshake(ctx context.Context, conn net.Conn, h Header) (Reply, error) {
	type result struct {
		reply Reply
		err   error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		if r.err = WriteMessage(conn, h); r.err == nil {
			r.err = ReadMessage(conn, &r.reply)
		}
		done <- r
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return r.reply, fmt.Errorf("open a stream to the agent: %w: %w", r.err, errdefs.ErrUnavailable)
		}
		return r.reply, r.reply.Err()
	case <-ctx.Done():
		return Reply{}, context.Cause(ctx)
	}
}
