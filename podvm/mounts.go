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
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/share"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// kubeletVolume matches the folders of volumes that the kubelet itself fills, by kind and name.
var kubeletVolume = regexp.MustCompile(`/pods/[^/]+/volumes/kubernetes\.io~(configmap|secret|projected|downward-api|empty-dir)/([^/]+)(/.*)?$`)

// mounts says how each mount of the container reaches it. What can't is refused with the reason.
func (n *newContainer) mounts(ctx context.Context) ([]*agent.Mount, error) {
	var all []*agent.Mount
	for _, m := range n.record.Config.Mounts {
		one, err := n.mount(ctx, m)
		if err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.ContainerPath, err)
		}
		all = append(all, one)
	}
	for _, d := range n.record.Config.Devices {
		one, err := n.device(ctx, d)
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", d.HostPath, err)
		}
		if one != nil {
			all = append(all, one)
		}
	}
	return all, nil
}

func (n *newContainer) mount(ctx context.Context, m Mount) (*agent.Mount, error) {
	to := &agent.Mount{Destination: m.ContainerPath, Options: mountOptions(m)}
	if m.Image != "" {
		_, address, err := n.attachImage(ctx, m.Image)
		if err != nil {
			return nil, err
		}
		to.Source = &agent.Mount_Disk{Disk: &agent.DiskMount{Addr: address, Dax: isPMEM(address), SubPath: m.SubPath}}
		return to, nil
	}
	if m.Propagation == "rshared" {
		return nil, fmt.Errorf("propagation Bidirectional: what is mounted in a VM can't appear on the node; use None or HostToContainer, or %s: %w", elsewhere, errdefs.ErrNotImplemented)
	}
	if !filepath.IsAbs(m.HostPath) {
		return nil, fmt.Errorf("host path %q: want an absolute path: %w", m.HostPath, errdefs.ErrInvalidArgument)
	}
	path, info, err := n.hostPathSoon(ctx, m.HostPath)
	if err != nil {
		return nil, fmt.Errorf("host path: %w", err)
	}
	switch match := kubeletVolume.FindStringSubmatch(path); {
	case info.Mode().IsRegular():
		return to, n.copyFile(to, path, info, m.ReadOnly)
	case !info.IsDir():
		return nil, special(path, info.Mode())
	case match != nil && match[1] == "empty-dir":
		return to, n.emptyDir(ctx, to, strings.TrimSuffix(path, match[3]), match[3], path, m)
	case match != nil && match[3] == "":
		return to, n.copyVolume(to, path)
	}
	if dir, sub, err := emptyDirOf(path); err != nil {
		return nil, err
	} else if dir != "" {
		return to, n.emptyDir(ctx, to, dir, sub, path, m)
	}
	return to, n.share(ctx, to, path, m)
}

// elsewhere is what is left to do about what no VM can have.
const elsewhere = "run the pod on a node with another runtime"

// special is the error of a path that is neither a file nor a directory.
func special(path string, m fs.FileMode) error {
	kind, instead := m.Type().String(), ""
	switch {
	case m&fs.ModeSocket != 0:
		kind, instead = "socket", "connect over the network, or "
	case m&fs.ModeNamedPipe != 0:
		kind = "named pipe"
	case m&fs.ModeCharDevice != 0:
		kind = "character device"
	case m&fs.ModeDevice != 0:
		kind, instead = "block device", "use a volume of volumeMode Block and volumeDevices, or "
	}
	return fmt.Errorf("%s is a %s, whose other end is the node's kernel and not the pod's; %s%s: %w", path, kind, instead, elsewhere, errdefs.ErrNotImplemented)
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

// hostLimit is how long the node's file systems may take to find, and to show, a path: the pod can't be stopped
// meanwhile.
const hostLimit = 30 * time.Second

func (n *newContainer) hostPathSoon(ctx context.Context, path string) (string, fs.FileInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, hostLimit)
	defer cancel()
	return n.m.hostPath(ctx, path)
}

// hostFile is a path of the host without symbolic links, and what is there.
type hostFile struct {
	path string
	info fs.FileInfo
}

// hostPath resolves symbolic links, and makes a directory that is missing, as containerd does. A file system
// that does not answer, as that of a lost server, keeps one thread however often it is asked.
func (m *Manager) hostPath(ctx context.Context, path string) (string, fs.FileInfo, error) {
	found := m.paths.DoChan(path, func() (any, error) { return findHostFile(path) })
	select {
	case r := <-found:
		f, _ := r.Val.(hostFile)
		return f.path, f.info, r.Err
	case <-ctx.Done():
		return "", nil, fmt.Errorf("the file system of %s does not answer: %w", path, context.Cause(ctx))
	}
}

func findHostFile(path string) (hostFile, error) {
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return hostFile{}, noSpace(err, path)
		}
		real, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return hostFile{}, err
	}
	info, err := os.Stat(real)
	return hostFile{real, info}, err
}

// setName names the copies of a host path in the guest: the same path is the same copy.
func setName(path string) string {
	sum := sha256.Sum256([]byte(path))
	return hex.EncodeToString(sum[:16])
}

// copyFile copies a single file in: /etc/hosts, the termination log. If the container writes it, it
// comes back when the container ends.
func (n *newContainer) copyFile(to *agent.Mount, path string, info fs.FileInfo, readOnly bool) error {
	f, err := readFile(path, "", info)
	if err != nil {
		return err
	}
	name := setName(path)
	to.Source = n.give(fileSet{&agent.Files{Name: name, Single: true, Writeback: !readOnly, Files: []*agent.File{f}}, make(semaphore, 1)})
	if !readOnly {
		n.record.WriteBack[name] = path
	}
	return nil
}

// emptyDir mounts a part of an emptyDir, whose folder on the node is root: path is that part there.
func (n *newContainer) emptyDir(ctx context.Context, to *agent.Mount, root, sub, path string, m Mount) error {
	e, err := guestEmptyDir(root, strings.TrimPrefix(sub, "/"))
	if err != nil {
		return fmt.Errorf("emptyDir %s: %w", filepath.Base(root), err)
	}
	if n.Pod.record.now().NodeEmptyDirs && !e.Memory {
		return n.share(ctx, to, path, m)
	}
	to.Source = &agent.Mount_EmptyDir{EmptyDir: e}
	return nil
}

// guestEmptyDir is an emptyDir of the guest's: on the scratch disk, or a tmpfs where the kubelet made one.
func guestEmptyDir(root, sub string) (*agent.EmptyDir, error) {
	e := &agent.EmptyDir{Name: filepath.Base(root), SubPath: sub}
	info, err := os.Stat(root)
	if err != nil {
		return nil, err
	}
	if st, ok := info.Sys().(*unixStat); ok {
		e.Mode, e.Gid = st.Mode&0o7777, st.Gid
	}
	var file, parent unix.Statfs_t
	if err := errors.Join(unix.Statfs(root, &file), unix.Statfs(filepath.Dir(root), &parent)); err != nil {
		return nil, err
	}
	if file.Type == unix.HUGETLBFS_MAGIC {
		return nil, fmt.Errorf("medium HugePages, instead of which use medium Memory: %w", errHugePages)
	}
	if file.Type == unix.TMPFS_MAGIC && file.Fsid != parent.Fsid {
		e.Memory, e.Size = true, int64(file.Blocks)*file.Bsize
	}
	return e, nil
}

// share has a directory of the host served to the guest.
func (n *newContainer) share(ctx context.Context, to *agent.Mount, path string, m Mount) error {
	d := share.Dir{Path: path, ReadOnly: m.ReadOnly, Recursive: m.RecursiveReadOnly, Follow: m.Propagation == "rslave"}
	if d.ReadOnly && !d.Recursive {
		below, err := mountsBelow(path)
		if err != nil {
			return err
		}
		if d.Recursive = !below && !d.Follow; !d.Recursive {
			// For the guest all of it is one mount: what may be written of it is left to the node.
			to.Options = slices.DeleteFunc(to.Options, func(o string) bool { return o == "ro" })
		}
	}
	d.Keep = d.Follow && n.mountsIn(m.ContainerPath)
	d.Tag = setName(fmt.Sprint(d.Path, " ", d.ReadOnly, " ", d.Recursive, " ", d.Follow, " ", d.Keep))
	if err := n.serve(ctx, d); err != nil {
		return err
	}
	to.Source = &agent.Mount_Share{Share: &agent.Share{Tag: d.Tag}}
	if slices.Contains(n.Pod.record.now().Shares, d) {
		return nil
	}
	return n.Pod.record.set(func(r *podRecord) { r.Shares = append(slices.Clone(r.Shares), d) })
}

// serve begins to serve a directory to the guest.
func (p *Pod) serve(ctx context.Context, d share.Dir) error {
	ctx, cancel := context.WithTimeout(ctx, hostLimit)
	defer cancel()
	if err := p.m.o.Shares.Share(ctx, p.sharing(), d); err != nil {
		return fmt.Errorf("host directory %s: %w", d.Path, err)
	}
	return nil
}

// mountsIn tells whether the container has mounts below one of its directories.
func (n *newContainer) mountsIn(dir string) bool {
	return slices.ContainsFunc(n.record.Config.Mounts, func(m Mount) bool {
		return strings.HasPrefix(filepath.Clean(m.ContainerPath), strings.TrimSuffix(filepath.Clean(dir), "/")+"/")
	})
}

func (p *Pod) sharing() share.Pod {
	return share.Pod{ID: p.id, Dir: p.m.layout.run(p.id), Cgroup: p.record.now().VM.Cgroup, Guest: p}
}

// release ends what is served to the guest.
func (p *Pod) release(ctx context.Context) error {
	return p.m.o.Shares.Release(ctx, p.m.layout.run(p.id))
}

// guestDevices are devices that every guest has itself.
var guestDevices = map[string]bool{
	"/dev/null": true, "/dev/zero": true, "/dev/full": true, "/dev/random": true, "/dev/urandom": true, "/dev/tty": true,
}

// device gives a container a block device of the host as one of the guest's.
func (n *newContainer) device(ctx context.Context, d Device) (*agent.Mount, error) {
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
		return nil, fmt.Errorf("only block devices of the node reach a pod in a VM; leave this one out (a privileged container has the guest's own), or %s: %w", elsewhere, errdefs.ErrNotImplemented)
	}
	to := &agent.Mount{Destination: d.ContainerPath}
	disk := vmm.Disk{Path: path, ReadOnly: !strings.Contains(d.Permissions, "w")}
	key := path
	if disk.ReadOnly {
		key, to.Options = path+" ro", []string{"ro"}
	}
	disk.Serial = setName(key)[:vmm.SerialMax]
	address, err := n.attachDisk(ctx, key, disk)
	if err != nil {
		return nil, err
	}
	to.Source = &agent.Mount_Device{Device: &agent.BlockDevice{Addr: address}}
	return to, nil
}
