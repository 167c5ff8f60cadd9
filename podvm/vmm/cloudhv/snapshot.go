package cloudhv

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/internal/atomicfile"
)

// Snapshot implements vmm.Snapshotter. The guest's memory is in Config.MemoryFile already, a shared
// mapping, so that Cloud Hypervisor writes only the devices' state.
// Source: PUT /vm.pause, /vm.snapshot of Cloud Hypervisor.
func (v *vm) Snapshot(ctx context.Context, dir string) error {
	if filepath.Dir(v.Config.MemoryFile) != filepath.Clean(dir) {
		return fmt.Errorf("snapshot: the memory file %q is not in %s: %w", v.Config.MemoryFile, dir, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	if err := v.quiet(ctx); err != nil {
		return fmt.Errorf("snapshot: %w", v.Explain(err))
	}
	if err := v.api.put(ctx, "vm.pause", nil, nil); err != nil {
		return fmt.Errorf("snapshot: %w", v.Explain(err))
	}
	if err := v.api.put(ctx, "vm.snapshot", map[string]string{"destination_url": "file://" + dir}, nil); err != nil {
		return fmt.Errorf("snapshot: %w", v.Explain(err))
	}
	if err := stopClock(filepath.Join(dir, "state.json")); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	return nil
}

// kvmClock is the clock of KVM in a VM's state: the bytes of struct kvm_clock_data in JSON in a string of
// JSON. The ninth is the lowest of its flags.
var kvmClock = regexp.MustCompile(`\\"clock\\":\{\\"Kvm\\":\[(?:\d+,){8}(\d+),`)

// clockRealtime is KVM_CLOCK_REALTIME: a clock that is set with it goes on from where it would be by now.
// Source: KVM_SET_CLOCK in Documentation/virt/kvm/api.rst of Linux.
const clockRealtime = 4

// stopClock has clones go on with the clock of a VM's state as it stands. Cloud Hypervisor 54 has it jump
// by the time since the snapshot, and whatever waits in a guest for less is due in a clone's first moments. A
// state without such a clock is left alone.
func stopClock(path string) error {
	state, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	m := kvmClock.FindSubmatchIndex(state)
	if m == nil {
		return nil
	}
	flags, err := strconv.Atoi(string(state[m[2]:m[3]]))
	if err != nil {
		return err
	}
	state = slices.Concat(state[:m[2]], []byte(strconv.Itoa(flags&^clockRealtime)), state[m[3]:])
	return atomicfile.Write(path, state, 0o600)
}
