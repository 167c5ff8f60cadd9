package podvm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// kubeletVolume matches the folders of volumes that the kubelet itself fills, by kind and name.
var kubeletVolume = regexp.MustCompile(`/pods/[^/]+/volumes/kubernetes\.io~(configmap|secret|projected|downward-api|empty-dir)/([^/]+)(/.*)?$`)

// mounts says how each mount of a container reaches it. What can't is refused with the reason.
func (p *Pod) mounts(ctx context.Context, c ContainerConfig, record *containerRecord) ([]*agent.Mount, error) {
	var all []*agent.Mount
	for _, m := range c.Mounts {
		one, err := p.mount(ctx, m, record)
		if err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.ContainerPath, err)
		}
		all = append(all, one)
	}
	for _, d := range c.Devices {
		one, err := p.device(ctx, d)
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", d.HostPath, err)
		}
		if one != nil {
			all = append(all, one)
		}
	}
	return all, nil
}

func (p *Pod) mount(ctx context.Context, m Mount, record *containerRecord) (*agent.Mount, error) {
	to := &agent.Mount{Destination: m.ContainerPath, Options: mountOptions(m)}
	if m.Image != "" {
		_, address, err := p.attachImage(ctx, m.Image)
		if err != nil {
			return nil, err
		}
		to.Source = &agent.Mount_Disk{Disk: &agent.DiskMount{Addr: address, Dax: strings.HasPrefix(address, "pci:"), SubPath: m.SubPath}}
		return to, nil
	}
	if m.Propagation == "rshared" {
		return nil, fmt.Errorf("Bidirectional propagation: what is mounted in a VM can't appear on the node: %w", errdefs.ErrNotImplemented)
	}
	path, info, err := hostPath(m.HostPath)
	if err != nil {
		return nil, err
	}
	switch match := kubeletVolume.FindStringSubmatch(path); {
	case info.Mode().IsRegular():
		return to, p.copyFile(to, path, info, m.ReadOnly, record)
	case !info.IsDir():
		return nil, fmt.Errorf("%s is a %s, and neither a file nor a directory: %w", path, info.Mode().Type(), errdefs.ErrNotImplemented)
	case match != nil && match[1] == "empty-dir":
		return to, emptyDir(to, path, match[2], match[3], info)
	case match != nil:
		return to, p.copyVolume(to, path, record)
	}
	return nil, fmt.Errorf("host directory %s: only emptyDir, configMap, secret, projected and downwardAPI volumes, image volumes and single files reach a pod in a VM yet: %w", path, errdefs.ErrNotImplemented)
}

func mountOptions(m Mount) []string {
	options := []string{"rbind", "rprivate"}
	if m.Propagation == "rslave" {
		options[1] = "rslave"
	}
	switch {
	case m.RecursiveReadOnly:
		options = append(options, "rro")
	case m.ReadOnly:
		options = append(options, "ro")
	}
	return options
}

// hostPath resolves symbolic links, and makes a directory that is missing, as containerd does.
func hostPath(path string) (string, fs.FileInfo, error) {
	if !filepath.IsAbs(path) {
		return "", nil, fmt.Errorf("host path %q: want an absolute path: %w", path, errdefs.ErrInvalidArgument)
	}
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return "", nil, fmt.Errorf("host path: %w", noSpace(err, path))
		}
		real, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return "", nil, fmt.Errorf("host path: %w", err)
	}
	info, err := os.Stat(real)
	if err != nil {
		return "", nil, fmt.Errorf("host path: %w", err)
	}
	return real, info, nil
}

// setName names the copies of a host path in the guest: the same path is the same copy.
func setName(path string) string {
	sum := sha256.Sum256([]byte(path))
	return hex.EncodeToString(sum[:16])
}

// copyFile copies a single file in: /etc/hosts, the termination log. What the container writes comes
// back when it ends.
func (p *Pod) copyFile(to *agent.Mount, path string, info fs.FileInfo, readOnly bool, record *containerRecord) error {
	f, err := readFile(path, "", info)
	if err != nil {
		return err
	}
	name := setName(path)
	to.Source = &agent.Mount_Files{Files: &agent.Files{Name: name, Single: true, Writeback: !readOnly, Files: []*agent.File{f}}}
	if !readOnly {
		record.WriteBack[name] = path
	}
	return nil
}

// emptyDir is made in the guest: on the scratch disk, or as a tmpfs where the kubelet made one.
func emptyDir(to *agent.Mount, path, name, sub string, info fs.FileInfo) error {
	e := &agent.EmptyDir{Name: name, SubPath: strings.TrimPrefix(sub, "/"), Mode: uint32(info.Mode().Perm())}
	if info.Mode()&fs.ModeSetgid != 0 {
		e.Mode |= unix.S_ISGID
	}
	if st, ok := info.Sys().(*unixStat); ok {
		e.Gid = st.Gid
	}
	root := strings.TrimSuffix(path, sub)
	var file, parent unix.Statfs_t
	if err := errors.Join(unix.Statfs(root, &file), unix.Statfs(filepath.Dir(root), &parent)); err != nil {
		return fmt.Errorf("emptyDir %s: %w", name, err)
	}
	if file.Type == unix.TMPFS_MAGIC && file.Fsid != parent.Fsid {
		e.Memory, e.Size = true, int64(file.Blocks)*file.Bsize
	}
	to.Source = &agent.Mount_EmptyDir{EmptyDir: e}
	return nil
}

// guestDevices are devices that every guest has itself.
var guestDevices = map[string]bool{
	"/dev/null": true, "/dev/zero": true, "/dev/full": true, "/dev/random": true, "/dev/urandom": true, "/dev/tty": true,
}

// device gives a container a block device of the host as one of the guest's.
func (p *Pod) device(ctx context.Context, d Device) (*agent.Mount, error) {
	if guestDevices[d.HostPath] && d.ContainerPath == d.HostPath {
		return nil, nil
	}
	path, err := filepath.EvalSymlinks(d.HostPath)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode()&fs.ModeDevice == 0 || info.Mode()&fs.ModeCharDevice != 0 {
		return nil, fmt.Errorf("only block devices reach a pod in a VM: %w", errdefs.ErrNotImplemented)
	}
	p.mu.Lock()
	address := p.record.Disks[path]
	p.mu.Unlock()
	if address == "" {
		if address, err = p.machine().AddDisk(ctx, vmm.Disk{Serial: setName(path)[:vmm.SerialMax], Path: path, ReadOnly: !strings.Contains(d.Permissions, "w")}); err != nil {
			return nil, err
		}
		p.mu.Lock()
		p.record.Disks[path] = address
		err = p.saveLocked()
		p.mu.Unlock()
	}
	return &agent.Mount{Destination: d.ContainerPath, Source: &agent.Mount_Device{Device: &agent.BlockDevice{Addr: address}}}, err
}
