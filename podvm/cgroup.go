package podvm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// hostCgroup makes the cgroup of a pod's VMM below the one that the kubelet made for the pod, so
// that all of a pod counts against it. It returns "" where there is no parent, or no cgroup v2.
func hostCgroup(parent, id string) (string, error) {
	if parent == "" || !unified() {
		return "", nil
	}
	dir, err := cgroupPath(parent)
	if err != nil {
		return "", err
	}
	// With the systemd driver the slice is there already; the folder below it is not a unit, which
	// systemd leaves alone in a slice of the kubelet's, as it does those of other runtimes.
	path := filepath.Join(cgroupRoot, dir, "caisson-"+id[:shortID])
	if err := os.MkdirAll(path, 0o755); err != nil {
		return "", fmt.Errorf("cgroup of pod: %w", err)
	}
	return path, nil
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
	os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0) // an error is that of Remove, too
	const limit, step = 5 * time.Second, 10 * time.Millisecond
	for end := time.Now().Add(limit); ; time.Sleep(step) {
		err := unix.Rmdir(path)
		switch {
		case err == nil, errors.Is(err, fs.ErrNotExist):
			return nil
		case !errors.Is(err, unix.EBUSY) || time.Now().After(end):
			return fmt.Errorf("remove cgroup %s: %w", path, err)
		}
	}
}
