package podvm

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
)

// kubeletSubPath matches where the kubelet mounts a subPath of a pod's volume, by the pod's folder and the
// volume's name.
var kubeletSubPath = regexp.MustCompile(`^(.*/pods/[^/]+)/volume-subpaths/([^/]+)/[^/]+/[0-9]+$`)

// emptyDirOf finds out whether a host path is a subPath of an emptyDir. Its own files are the guest's, and
// the node has only folders of the same names, which the kubelet made. It returns the emptyDir's folder, or
// "", and the path in it.
func emptyDirOf(path string) (dir, sub string, err error) {
	match := kubeletSubPath.FindStringSubmatch(path)
	if match == nil {
		return "", "", nil
	}
	dir = filepath.Join(match[1], "volumes/kubernetes.io~empty-dir", match[2])
	if _, err := os.Stat(dir); os.IsNotExist(err) {
		return "", "", nil
	} else if err != nil {
		return "", "", err
	}
	volume, volumeDevice, err := inFileSystem(dir)
	if err != nil {
		return "", "", err
	}
	here, device, err := inFileSystem(path)
	if err != nil {
		return "", "", err
	}
	sub, err = filepath.Rel(volume, here)
	if err != nil || !filepath.IsLocal(sub) || device != volumeDevice {
		return "", "", fmt.Errorf("%s is no part of the emptyDir %s: %w", path, match[2], errdefs.ErrFailedPrecondition)
	}
	return dir, sub, nil
}

// inFileSystem is the path of a directory in the file system that it is of, wherever that is mounted, and that
// one's device.
func inFileSystem(dir string) (path, device string, err error) {
	above := func(m *mountinfo.Info) (skip, stop bool) {
		return m.Mountpoint != "/" && dir != m.Mountpoint && !strings.HasPrefix(dir, m.Mountpoint+"/"), false
	}
	mounts, err := mountinfo.GetMounts(above)
	if err != nil {
		return "", "", err
	}
	var at *mountinfo.Info
	for _, m := range mounts { // the last of the nearest covers the others
		if at == nil || len(m.Mountpoint) >= len(at.Mountpoint) {
			at = m
		}
	}
	if at == nil {
		return "", "", fmt.Errorf("mount of %s: %w", dir, fs.ErrNotExist)
	}
	rel, err := filepath.Rel(at.Mountpoint, dir)
	if err != nil {
		return "", "", err
	}
	return filepath.Join(at.Root, rel), fmt.Sprintf("%d:%d", at.Major, at.Minor), nil
}

// mountsBelow tells whether something is mounted below a directory.
func mountsBelow(dir string) (bool, error) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		below := strings.HasPrefix(m.Mountpoint, strings.TrimSuffix(dir, "/")+"/") && m.Mountpoint != dir
		return !below, below
	})
	return len(mounts) > 0, err
}
