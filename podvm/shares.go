package podvm

import (
	"context"

	"github.com/caisson-vm/caisson/podvm/share"
)

// Shares serves directories of the host to guests, as share.Server does.
type Shares interface {
	Share(ctx context.Context, pod share.Pod, d share.Dir) error
	Resume(pod share.Pod, dirs []share.Dir)
	// SetOOMScore is process.SetOOMScore for what serves the pod with this runtime folder, if anything does.
	SetOOMScore(run string, score int) error
	Release(ctx context.Context, run string) error
}
