package podvm

import (
	"context"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// Shares serves directories of the host to guests. Where there is none (nil), containers that want
// one are refused.
type Shares interface {
	// Share begins to serve the directory on streams (agent.KindShare) that it dials itself, and
	// returns when the guest may mount it. Serving goes on until Release, through broken streams.
	// A tag that is being served to the pod already is no error.
	Share(ctx context.Context, pod string, guest agent.Dialer, d SharedDir) error
	// Release ends all that is served to the pod. It is idempotent.
	Release(pod string)
}

// SharedDir is a directory of the host that a guest sees.
type SharedDir struct {
	// Tag names it in its pod: it is made of the rest, so that the same directory is served once.
	Tag string
	// Path is absolute and has no symbolic links in it.
	Path     string
	ReadOnly bool
}
