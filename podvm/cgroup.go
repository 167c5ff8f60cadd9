package podvm

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// cgroups are where VMMs run on the node.
type cgroups struct{ warn sync.Once }

// path is the cgroup of a pod's VMM, below the one that the kubelet made for the pod, so that all of
// a pod counts against it. It is "" where there is no parent, or no cgroup v2.
//
// With the systemd driver the parent is a slice, and the cgroup becomes a scope (see delegate).
func (c *cgroups) path(parent, id string) (string, error) {
	if parent == "" {
		return "", nil
	}
	dir, err := cgroupPath(parent)
	if err != nil {
		return "", err
	}
	if !unified() {
		c.warn.Do(func() {
			slog.Warn("no cgroup v2 at " + cgroupRoot + ": pods' VMs are not in the kubelet's cgroups, whose limits do not hold for them")
		})
		return "", nil
	}
	name := "caisson-" + id[:shortID]
	if strings.HasSuffix(dir, ".slice") && scopes() {
		name += scopeSuffix
	}
	return filepath.Join(cgroupRoot, dir, name), nil
}

func makeCgroup(path string) error {
	if path == "" {
		return nil
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return fmt.Errorf("cgroup of pod: %w", err)
	}
	return nil
}

// unified tells whether the node has cgroup v2.
func unified() bool {
	var fs unix.Statfs_t
	return unix.Statfs(cgroupRoot, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC
}

// cgroupPath is the folder of a cgroup as the kubelet names it: a path, or a systemd slice whose
// name holds its ancestors ("a-b.slice" is a.slice/a-b.slice).
func cgroupPath(parent string) (string, error) {
	base := filepath.Base(parent)
	if !strings.HasSuffix(base, ".slice") {
		return filepath.Clean("/" + parent), nil
	}
	name := strings.TrimSuffix(base, ".slice")
	if name == "-" {
		return "/", nil
	}
	var path, prefix string
	for part := range strings.SplitSeq(name, "-") {
		if part == "" {
			return "", fmt.Errorf("cgroup parent %q is no systemd slice: %w", parent, errdefs.ErrInvalidArgument)
		}
		prefix += part
		path += "/" + prefix + ".slice"
		prefix += "-"
	}
	return path, nil
}

// removeCgroup ends what is in the cgroup and removes it. It is idempotent.
func removeCgroup(path string) error {
	if path == "" {
		return nil
	}
	const limit, step = 5 * time.Second, 10 * time.Millisecond
	for end := time.Now().Add(limit); ; time.Sleep(step) {
		err := unix.Rmdir(path)
		switch {
		case err == nil, errors.Is(err, fs.ErrNotExist):
			return nil
		case !errors.Is(err, unix.EBUSY) || time.Now().After(end):
			return fmt.Errorf("remove cgroup %s: %w", path, err)
		}
		// Killed processes take a moment to go; nobody tells when they have.
		if err := os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("kill cgroup %s: %w", path, err)
		}
	}
}
