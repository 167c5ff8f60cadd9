package podvm

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// maxImageVolumes bounds how many directories an image can have made for each of its containers.
const maxImageVolumes = 128

// imageVolumes are the paths of an image's volumes (VOLUME of a Dockerfile), as the container sees them, without
// those at or below a place where the container has something else.
func imageVolumes(declared map[string]struct{}, mounts []Mount) ([]string, error) {
	taken := []string{"/proc", "/sys", "/dev/shm", "/dev/mqueue", "/dev/pts", "/etc/resolv.conf", "/etc/hostname"}
	for _, m := range mounts {
		taken = append(taken, path.Clean(m.ContainerPath))
	}
	var paths []string
	for name := range maps.Keys(declared) {
		at := path.Clean("/" + name)
		if at == "/" {
			return nil, fmt.Errorf("the image declares its root as a volume; have it built without that: %w", errdefs.ErrInvalidArgument)
		}
		if at != "/dev" && !slices.ContainsFunc(taken, func(above string) bool { return at == above || strings.HasPrefix(at, above+"/") }) {
			paths = append(paths, at)
		}
	}
	slices.Sort(paths)
	if paths = slices.Compact(paths); len(paths) > maxImageVolumes {
		return nil, fmt.Errorf("the image declares %d volumes, at most %d are made: %w", len(paths), maxImageVolumes, errdefs.ErrInvalidArgument)
	}
	return paths, nil
}
