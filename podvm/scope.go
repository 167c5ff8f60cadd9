package podvm

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

const scopeSuffix = ".scope"

// scopes tells whether systemd runs this machine and so keeps its cgroups.
func scopes() bool {
	_, err := os.Stat("/run/systemd/system")
	return err == nil
}

// delegate makes the cgroup, and the VMM in it, a scope of systemd's with delegation. systemd takes
// from a slice every controller that none of its units has a use for, now or at any later change
// near by, and a kubelet whose pod lacks one kills the pod. A scope with delegation uses all. It
// ends, and its cgroup goes, with the VMM.
func delegate(ctx context.Context, cgroup string, pid int) error {
	unit := filepath.Base(cgroup)
	if !strings.HasSuffix(unit, scopeSuffix) {
		return nil
	}
	c, err := systemd.NewSystemdConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("scope %s: %w", unit, err)
	}
	defer c.Close()
	properties := []systemd.Property{
		systemd.PropDescription("VM of a pod"),
		systemd.PropSlice(filepath.Base(filepath.Dir(cgroup))),
		systemd.PropPids(uint32(pid)),
		property("Delegate", true),
		property("DefaultDependencies", false),
		property("TasksMax", uint64(math.MaxUint64)),
		// A scope that failed would otherwise be kept for somebody to look at.
		property("CollectMode", "inactive-or-failed"),
	}
	if service := ownService(); service != "" { // where the machine goes down, the VM ends after the daemon
		properties = append(properties, systemd.PropBefore(service))
	}
	if _, err := c.StartTransientUnitContext(ctx, unit, "fail", properties, nil); err != nil {
		return fmt.Errorf("scope %s: %w", unit, err)
	}
	return nil
}

// ownService is the unit that this daemon is of; "" where it is of none.
var ownService = sync.OnceValue(func() string {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return ""
	}
	if name := filepath.Base(strings.TrimSpace(string(data))); strings.HasSuffix(name, ".service") {
		return name
	}
	return ""
})

// GoingDown tells whether systemd takes the whole machine down.
func GoingDown(ctx context.Context) bool {
	if !scopes() {
		return false
	}
	c, err := systemd.NewSystemdConnectionContext(ctx)
	if err != nil {
		slog.Warn("it is not known whether the machine goes down: pods run on", "err", err)
		return false
	}
	defer c.Close()
	state, err := c.SystemStateContext(ctx)
	if err != nil {
		slog.Warn("it is not known whether the machine goes down: pods run on", "err", err)
		return false
	}
	return state.Value.Value() == "stopping"
}

func property(name string, value any) systemd.Property {
	return systemd.Property{Name: name, Value: dbus.MakeVariant(value)}
}
