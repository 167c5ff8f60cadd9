package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	copyfs "github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// imageVolumes makes a directory for each path that the container's image declares as a volume, with what the
// image has there. They are beside the writable layer, and go with it.
func (c *container) imageVolumes(image string, paths []string) ([]specs.Mount, error) {
	var mounts []specs.Mount
	for i, at := range paths {
		dir := filepath.Join(c.layer, "volumes", strconv.Itoa(i))
		if err := fillVolume(dir, image, at); err != nil {
			return nil, fmt.Errorf("%s, which the image declares as a volume: %w", at, err)
		}
		mounts = append(mounts, specs.Mount{Destination: at, Type: "bind", Source: dir, Options: []string{"rbind", "rprivate"}})
	}
	return mounts, nil
}

// fillVolume makes dir a copy of a directory of the image, or an empty one where it has none.
func fillVolume(dir, image, at string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o711); err != nil {
		return err
	}
	f, err := openInRoot(image, at, unix.O_PATH|unix.O_DIRECTORY)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return os.Mkdir(dir, 0o755)
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return fmt.Errorf("it has no directory there: %w: %w", err, errdefs.ErrInvalidArgument)
	case err != nil:
		return err
	}
	defer f.Close()
	return copyfs.CopyDir(dir, fmt.Sprintf("/proc/self/fd/%d/.", f.Fd()), copyfs.WithXAttrExclude("security.selinux"))
}
