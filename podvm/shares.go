package podvm

import (
	"context"

	"github.com/caisson-vm/caisson/podvm/share"
)

// Shares serves directories of the host to guests, as share.Server does.
type Shares interface {
	Share(ctx context.Context, pod share.Pod, d share.Dir) error
	Resume(pod share.Pod, dirs []share.Dir)
	Release(ctx context.Context, run string) error
}
