package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mounting makes a container's mounts from a request.
type mounting struct {
	c    *container
	spec *specs.Spec
	// held are mounts by which crun finds sources; they stay until it has mounted them.
	held []string
}

// close gives up the sources. It removes no more than the empty places they were mounted at: nothing of
// a volume, should one still be mounted.
func (m *mounting) close() {
	for _, at := range m.held {
		if err := errors.Join(unix.Unmount(at, unix.MNT_DETACH), os.Remove(at)); err != nil {
			slog.Warn("give up the source of a mount", "container", m.c.id, "err", err)
		}
	}
}

// add returns the mount, or nil for what is none, a device.
func (m *mounting) add(ctx context.Context, req *agent.Mount) (*specs.Mount, error) {
	if !filepath.IsAbs(req.Destination) {
		return nil, fmt.Errorf("mount at %q: not an absolute path: %w", req.Destination, errdefs.ErrInvalidArgument)
	}
	source, err := m.source(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("mount at %s: %w", req.Destination, err)
	}
	if source == "" {
		return nil, nil
	}
	options := slices.Clone(req.Options)
	if !slices.ContainsFunc(options, func(o string) bool { return o == "bind" || o == "rbind" }) {
		options = append(options, "rbind")
	}
	if !slices.ContainsFunc(options, func(o string) bool {
		return strings.HasSuffix(o, "private") || strings.HasSuffix(o, "slave") || strings.HasSuffix(o, "shared")
	}) {
		options = append(options, "rprivate")
	}
	return &specs.Mount{Destination: req.Destination, Type: "bind", Source: source, Options: options}, nil
}

func (m *mounting) source(ctx context.Context, req *agent.Mount) (string, error) {
	a := m.c.a
	switch s := req.Source.(type) {
	case *agent.Mount_Files:
		if s.Files.Writeback {
			m.c.writeback = append(m.c.writeback, s.Files.Name)
		}
		return a.files.put(ctx, s.Files)
	case *agent.Mount_EmptyDir:
		scratch, _ := a.storage()
		dir, err := a.vols.use(ctx, s.EmptyDir, scratch)
		if err != nil {
			return "", err
		}
		return m.sub(dir, s.EmptyDir.SubPath, true)
	case *agent.Mount_Disk:
		dir, err := a.disks.use(ctx, s.Disk.Addr, s.Disk.Dax)
		if err != nil {
			return "", err
		}
		m.c.undo.Push("release disk", func(context.Context) error { a.disks.release(s.Disk.Addr); return nil })
		return m.sub(dir, s.Disk.SubPath, false)
	case *agent.Mount_Share:
		return a.shares.use(ctx, s.Share.Tag)
	case *agent.Mount_Device:
		return "", m.device(ctx, req, s.Device)
	}
	return "", fmt.Errorf("a source of a kind that this agent can't mount: %w", errdefs.ErrNotImplemented)
}

// sub returns a path below dir, through no link that leads out of it; make makes what is missing.
// What was found is mounted aside, so that nobody can put a link in its way any more. A path of its
// descriptor would not do: crun mounts in a namespace of its own, and the kernel takes no source
// from another.
func (m *mounting) sub(dir, sub string, make bool) (string, error) {
	if sub == "" {
		return dir, nil
	}
	if !filepath.IsLocal(sub) {
		return "", fmt.Errorf("path %q leads out of its volume: %w", sub, errdefs.ErrInvalidArgument)
	}
	if make {
		if err := mkdirIn(dir, sub); err != nil {
			return "", err
		}
	}
	f, err := openInRoot(dir, sub, unix.O_PATH)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("no path %q in the volume: %w", sub, errdefs.ErrNotFound)
	} else if err != nil {
		return "", err
	}
	defer f.Close()
	at, err := m.aside(f)
	if err != nil {
		return "", fmt.Errorf("path %q of the volume: %w", sub, err)
	}
	return at, nil
}

// aside mounts an open file or directory at a place of its own and returns the place.
func (m *mounting) aside(f *os.File) (at string, err error) {
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if info.IsDir() {
		at, err = os.MkdirTemp(m.c.a.path("disks"), "sub-")
	} else {
		var file *os.File
		if file, err = os.CreateTemp(m.c.a.path("disks"), "sub-"); err == nil {
			at, err = file.Name(), file.Close()
		}
	}
	if err != nil {
		return "", err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), at, "", unix.MS_BIND, ""); err != nil {
		return "", errors.Join(err, os.Remove(at))
	}
	m.held = append(m.held, at)
	return at, nil
}

func mkdirIn(dir, sub string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if _, err := root.Stat(sub); err == nil {
		return nil
	}
	return root.MkdirAll(sub, 0o755)
}

// device makes a disk a device of the container.
func (m *mounting) device(ctx context.Context, req *agent.Mount, d *agent.BlockDevice) error {
	ctx, cancel := context.WithTimeout(ctx, deviceWait)
	defer cancel()
	dev, err := findDevice(ctx, d.Addr)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(dev, &st); err != nil {
		return err
	}
	major, minor := int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	access := "rwm"
	if slices.Contains(req.Options, "ro") {
		access = "rm"
	}
	mode := os.FileMode(0o660)
	l := m.spec.Linux
	l.Devices = append(l.Devices, specs.LinuxDevice{Path: req.Destination, Type: "b", Major: major, Minor: minor, FileMode: &mode})
	if l.Resources == nil {
		l.Resources = &specs.LinuxResources{}
	}
	l.Resources.Devices = append(l.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &major, Minor: &minor, Access: access})
	return nil
}

func (m *mounting) all(ctx context.Context, reqs []*agent.Mount) ([]specs.Mount, error) {
	var all []specs.Mount
	for _, req := range reqs {
		one, err := m.add(ctx, req)
		if err != nil {
			return nil, err
		}
		if one != nil {
			all = append(all, *one)
		}
	}
	return all, nil
}
