package podvm

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// defaultPath is the PATH of a container whose image has none.
const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// ociSpec is the OCI spec of a container, as far as the host knows it. The agent fills in the root,
// the cgroup, the user and the sources of mounts; the network, IPC and UTS namespaces are the
// guest's own, which is the pod's.
func ociSpec(pod PodConfig, c ContainerConfig, image ocispec.ImageConfig) (*specs.Spec, error) {
	args, err := arguments(c, image)
	if err != nil {
		return nil, err
	}
	s := &specs.Spec{
		Version: "1.0.2",
		Process: &specs.Process{
			Terminal: c.TTY, Args: args, Env: environment(pod, c, image), Cwd: workingDir(c, image),
			NoNewPrivileges: c.Security.NoNewPrivs,
		},
		Root:     &specs.Root{Readonly: c.Security.ReadOnlyRootfs},
		Hostname: pod.Hostname,
		Mounts:   defaultMounts(c.Security.Privileged),
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}},
		},
	}
	if c.Security.Privileged { // the guest's whole tree of cgroups, as on a node
		s.Linux.Namespaces = s.Linux.Namespaces[:2]
	}
	if s.Linux.Resources, err = resources(c.Resources); err != nil {
		return nil, err
	}
	s.Linux.Resources.Devices = deviceRules(c.Security.Privileged)
	adjust := int(c.Resources.OOMScoreAdj) // also 0: the agent's own is not for containers
	s.Process.OOMScoreAdj = &adjust
	if err := secure(s, c.Security); err != nil {
		return nil, err
	}
	return s, nil
}

// arguments follow Kubernetes: a command replaces entrypoint and arguments of the image, arguments
// alone replace only the image's.
func arguments(c ContainerConfig, image ocispec.ImageConfig) ([]string, error) {
	command, args := c.Command, c.Args
	if len(command) == 0 {
		command = image.Entrypoint
		if len(args) == 0 {
			args = image.Cmd
		}
	}
	all := append(append([]string{}, command...), args...)
	if len(all) == 0 {
		return nil, fmt.Errorf("no command: neither the container nor its image names one: %w", errdefs.ErrInvalidArgument)
	}
	return all, nil
}

// environment is the image's, then the container's; a later one replaces an earlier.
func environment(pod PodConfig, c ContainerConfig, image ocispec.ImageConfig) []string {
	var names []string
	values := map[string]string{}
	set := func(name, value string) {
		if _, ok := values[name]; !ok {
			names = append(names, name)
		}
		values[name] = value
	}
	name, value, _ := strings.Cut(defaultPath, "=")
	set(name, value)
	if pod.Hostname != "" {
		set("HOSTNAME", pod.Hostname)
	}
	if c.TTY {
		set("TERM", "xterm")
	}
	for _, e := range image.Env {
		if name, value, ok := strings.Cut(e, "="); ok && name != "" {
			set(name, value)
		}
	}
	for _, e := range c.Env {
		set(e.Name, string(e.Value))
	}
	all := make([]string, 0, len(names))
	for _, name := range names {
		all = append(all, name+"="+values[name])
	}
	return all
}

func workingDir(c ContainerConfig, image ocispec.ImageConfig) string {
	for _, dir := range []string{c.WorkingDir, image.WorkingDir} {
		if dir != "" {
			return path.Clean("/" + dir)
		}
	}
	return "/"
}

// defaultMounts are those of every container. /dev/shm is the pod's and comes from the agent.
func defaultMounts(privileged bool) []specs.Mount {
	kernel := []string{"nosuid", "noexec", "nodev", "ro"}
	if privileged {
		kernel[3] = "rw"
	}
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: kernel},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: append([]string{"relatime"}, kernel...)},
	}
}

// deviceRules are what a container may do with the guest's devices.
func deviceRules(privileged bool) []specs.LinuxDeviceCgroup {
	if privileged {
		return []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	}
	device := func(kind string, major, minor int64, access string) specs.LinuxDeviceCgroup {
		d := specs.LinuxDeviceCgroup{Allow: true, Type: kind, Access: access}
		if major >= 0 {
			d.Major = &major
		}
		if minor >= 0 {
			d.Minor = &minor
		}
		return d
	}
	return []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"},
		device("c", -1, -1, "m"), device("b", -1, -1, "m"),
		device("c", 1, 3, "rwm"), device("c", 1, 5, "rwm"), device("c", 1, 7, "rwm"), // null, zero, full
		device("c", 1, 8, "rwm"), device("c", 1, 9, "rwm"), // random, urandom
		device("c", 5, 0, "rwm"), device("c", 5, 2, "rwm"), device("c", 136, -1, "rwm"), // tty, ptmx, pts
		device("c", 10, 200, "rwm"), // net/tun, which runc allows, too
	}
}

// resources are the OCI's words for limits: 0 leaves one as it is, a negative one lifts it. CPUs have no numbers
// there: the guest's are others than the node's, and as many as the pod may use.
func resources(r Resources) (*specs.LinuxResources, error) {
	for size, limit := range r.HugepageLimits { // the kubelet sets 0 for every size that the node has
		if limit > 0 {
			return nil, fmt.Errorf("hugepages of %s: %w", size, errHugePages)
		}
	}
	l := &specs.LinuxResources{Unified: r.Unified}
	cpu := &specs.LinuxCPU{}
	if r.CPUShares > 0 {
		shares := uint64(r.CPUShares)
		cpu.Shares = &shares
	}
	if r.CPUQuota != 0 {
		cpu.Quota = &r.CPUQuota
	}
	if r.CPUPeriod > 0 {
		period := uint64(r.CPUPeriod)
		cpu.Period = &period
	}
	l.CPU = cpu
	if r.Memory != 0 {
		swap := r.Memory // together with memory: no swap
		if r.MemorySwap != 0 {
			swap = r.MemorySwap
		}
		if swap > 0 && swap < r.Memory {
			return nil, fmt.Errorf("memory and swap of %d bytes are less than the memory of %d: %w", swap, r.Memory, errdefs.ErrInvalidArgument)
		}
		l.Memory = &specs.LinuxMemory{Limit: &r.Memory, Swap: &swap}
	}
	return l, nil
}

var errHugePages = fmt.Errorf("a guest has no huge pages set aside; leave them out, or %s: %w", elsewhere, errdefs.ErrNotImplemented)

// pinned tells whether CPUs or memory of the node are asked for by their numbers.
func (r Resources) pinned() bool { return r.CPUSetCPUs != "" || r.CPUSetMems != "" }

// warnPinned says once of a container that such numbers have no effect: when it first has some.
func warnPinned(container string, before, after Resources) {
	if after.pinned() && !before.pinned() {
		slog.Warn("cpuset has no effect in a VM, whose vCPUs run on all CPUs of the pod's cgroup",
			"container", container, "cpus", after.CPUSetCPUs, "mems", after.CPUSetMems)
	}
}

// linuxResources is what the agent's Update takes.
func linuxResources(r Resources) ([]byte, error) {
	l, err := resources(r)
	if err != nil {
		return nil, err
	}
	return json.Marshal(l)
}

var errUserNamespace = fmt.Errorf("user namespaces inside a pod's VM are not supported yet; leave hostUsers unset: %w", errdefs.ErrNotImplemented)
