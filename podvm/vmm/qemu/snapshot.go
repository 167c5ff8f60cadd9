package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/internal/serialmux"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

const stateName = "state"

// Snapshot implements vmm.Snapshotter: a migration to a file, without the memory, which is in a
// file already. The channel is hung up first, so that the agent of a clone waits for its host as
// after a boot.
// Source: QMP migrate, capability x-ignore-shared.
func (v *vm) Snapshot(ctx context.Context, dir string) error {
	if filepath.Dir(v.Config.MemoryFile) != filepath.Clean(dir) {
		return fmt.Errorf("snapshot: the memory file %q is not in %s: %w", v.Config.MemoryFile, dir, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	if err := v.snapshot(ctx, dir); err != nil {
		return fmt.Errorf("snapshot: %w", v.Explain(err))
	}
	return nil
}

func (v *vm) snapshot(ctx context.Context, dir string) error {
	if err := v.hangUpForGood(ctx); err != nil {
		return err
	}
	v.setPaused(true)
	if err := v.control.execute(ctx, "stop", nil, nil); err != nil {
		return err
	}
	state, err := os.OpenFile(filepath.Join(dir, stateName), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer state.Close()
	if err := v.migrate(ctx, "migrate", state); err != nil {
		return err
	}
	return v.shape.write(dir)
}

// hangUpForGood ends the session on both sides.
func (v *vm) hangUpForGood(ctx context.Context) error {
	if v.current() == nil {
		return nil
	}
	v.hangUp()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", channelPath(v.Config.Dir))
	if err != nil {
		return err
	}
	return serialmux.Reset(ctx, conn)
}

// restore loads the template's state into a QEMU that waits for it, and runs the guest.
func (v *vm) restore(ctx context.Context) error {
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	state, err := os.Open(filepath.Join(v.Config.Template, stateName))
	if err != nil {
		return err
	}
	defer state.Close()
	// No switch need learn where the template's card has moved to.
	if err := v.control.execute(ctx, "migrate-set-parameters", object{"announce-rounds": 0}, nil); err != nil {
		return err
	}
	if err := v.migrate(ctx, "migrate-incoming", state); err != nil {
		return err
	}
	err = v.control.execute(ctx, "cont", nil, nil)
	v.setPaused(false)
	return err
}

// setPaused says whose doing it is when the guest stops.
func (v *vm) setPaused(paused bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.paused = paused
}

// migrate runs a migration to or from a file and waits for its end.
func (v *vm) migrate(ctx context.Context, command string, state *os.File) error {
	states := make(chan string, 16)
	v.mu.Lock()
	v.state = states
	v.mu.Unlock()
	capabilities := []object{{"capability": "events", "state": true}, {"capability": "x-ignore-shared", "state": true}}
	if err := v.control.execute(ctx, "migrate-set-capabilities", object{"capabilities": capabilities}, nil); err != nil {
		return err
	}
	if err := v.control.executeWith(ctx, "getfd", object{"fdname": stateName}, nil, state); err != nil {
		return err
	}
	if err := v.control.execute(ctx, command, object{"uri": "fd:" + stateName}, nil); err != nil {
		return err
	}
	for {
		select {
		case s := <-states:
			switch s {
			case "completed":
				return nil
			case "failed", "cancelled":
				return v.migrationError(ctx)
			}
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", command, context.Cause(ctx))
		}
	}
}

func (v *vm) migrationError(ctx context.Context) error {
	var info struct {
		Error string `json:"error-desc"`
	}
	if err := v.control.execute(ctx, "query-migrate", nil, &info); err != nil {
		return err
	}
	return errors.New("migration failed: " + info.Error)
}

func (v *vm) tellMigration(status string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.state != nil {
		select {
		case v.state <- status:
		default:
		}
	}
}

var _ vmm.Snapshotter = (*vm)(nil)
