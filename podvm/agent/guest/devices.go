package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Names in /dev that a privileged container does not get from the guest: every container has its own,
// or they are ways to the host, of which the agent is the only user.
var (
	ownNames   = []string{"console", "full", "null", "ptmx", "random", "tty", "urandom", "zero"}
	ownFolders = []string{"fd", "mqueue", "pts", "shm"}
	hostNames  = []string{"vsock", "vhost-vsock"}
)

// giveDevices gives the guest's devices to a container that may use all, as a privileged one on a node has
// the node's: those that are the kernel's own, such as /dev/fuse and /dev/loop-control. What the VMM
// made is left out, so that nobody writes to it by accident: disks, which hold the files of other
// containers, the agent's channel, the console. Containers are given disks by name.
func giveDevices(s *specs.Spec) error {
	if !mayAll(s) {
		return nil
	}
	all, err := kernelDevices("/dev", "/sys")
	if err != nil {
		return fmt.Errorf("devices of the guest: %w", err)
	}
	for _, d := range all {
		taken := slices.ContainsFunc(s.Linux.Devices, func(o specs.LinuxDevice) bool { return o.Path == d.Path }) ||
			slices.ContainsFunc(s.Mounts, func(m specs.Mount) bool { return filepath.Clean(m.Destination) == d.Path })
		if !taken {
			s.Linux.Devices = append(s.Linux.Devices, d)
		}
	}
	return nil
}

// mayAll tells whether a rule allows all devices there are.
func mayAll(s *specs.Spec) bool {
	return s.Linux.Resources != nil && slices.ContainsFunc(s.Linux.Resources.Devices, func(r specs.LinuxDeviceCgroup) bool {
		return r.Allow && (r.Type == "" || r.Type == "a") && r.Major == nil && r.Minor == nil && r.Access == "rwm"
	})
}

// kernelDevices are the nodes in dev of devices that no bus has: in sys they are virtual.
func kernelDevices(dev, sys string) ([]specs.LinuxDevice, error) {
	var all []specs.LinuxDevice
	err := filepath.WalkDir(dev, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a device that went meanwhile
		}
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dev, path)
		switch {
		case err != nil:
			return err
		case e.IsDir() && slices.Contains(ownFolders, name):
			return fs.SkipDir
		case e.Type()&fs.ModeDevice == 0 || slices.Contains(ownNames, name) || slices.Contains(hostNames, name) || strings.HasPrefix(name, "hvc"):
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return nil
		}
		kind, class := "c", "char"
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			kind, class = "b", "block"
		}
		major, minor := int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
		link, err := os.Readlink(filepath.Join(sys, "dev", class, fmt.Sprintf("%d:%d", major, minor)))
		if err != nil || !strings.Contains(link, "/devices/virtual/") {
			return nil
		}
		mode := os.FileMode(st.Mode & 0o777)
		all = append(all, specs.LinuxDevice{Path: "/dev/" + name, Type: kind, Major: major, Minor: minor, FileMode: &mode, UID: &st.Uid, GID: &st.Gid})
		return nil
	})
	return all, err
}
