package agent

import (
	"context"
	"sync/atomic"
	"time"
)

// watchdog notices a guest that answers nothing any more. One that nobody waits for is not asked whether
// it is there, so that it can sleep.
type watchdog struct {
	client *Client
	limit  time.Duration
	hung   func()
	asking atomic.Bool
}

// Guard calls hung once the guest has answered nothing for limit: not what it was asked for, nor the new
// stream by which it is then asked whether it is there. A call that takes long is thus no silence. hung is
// called again for what is asked later, until Close.
func (c *Client) Guard(limit time.Duration, hung func()) {
	c.dog.Store(&watchdog{client: c, limit: limit, hung: hung})
}

// asked begins to wait for the guest. answered tells that it was heard of.
func (c *Client) asked() (answered func()) {
	w := c.dog.Load()
	if w == nil {
		return func() {}
	}
	t := time.AfterFunc(w.limit/2, w.ask)
	return func() { t.Stop() }
}

// retry is how long after an attempt that failed the guest is asked again.
const retry = time.Second

// ask asks a guest that is silent for something that takes nothing but its being there.
func (w *watchdog) ask() {
	if !w.asking.CompareAndSwap(false, true) {
		return
	}
	defer w.asking.Store(false)
	ctx, cancel := context.WithTimeout(context.Background(), w.limit-w.limit/2)
	defer cancel()
	for {
		if _, err := w.client.current(); err != nil {
			return // it is closed
		}
		if conn, err := w.client.dial(ctx, Header{Kind: KindRPC}); err == nil {
			conn.Close()
			return
		}
		select {
		case <-time.After(retry):
		case <-ctx.Done():
			w.hung()
			return
		}
	}
}
