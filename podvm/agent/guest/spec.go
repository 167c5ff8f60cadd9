package guest

import (
	"cmp"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// decodeSpec reads the host's part of an OCI spec.
func decodeSpec(b []byte) (*specs.Spec, error) {
	var s specs.Spec
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("OCI spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if s.Process == nil || len(s.Process.Args) == 0 {
		return nil, fmt.Errorf("OCI spec: no command: %w", errdefs.ErrInvalidArgument)
	}
	// What crun says that it reads; it refuses later versions, whatever the spec makes use of.
	s.Version = "1.0.0"
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	return &s, nil
}

// complete fills in what the guest decides.
func (c *container) complete(s *specs.Spec, rootfs string, readonly bool, who account) {
	s.Root = &specs.Root{Path: rootfs, Readonly: readonly || s.Root != nil && s.Root.Readonly}
	s.Hostname, s.Domainname = "", ""
	s.Linux.CgroupsPath = c.cgroup()
	p := s.Process
	p.User.UID, p.User.GID, p.User.AdditionalGids, p.User.Username = who.uid, who.gid, who.groups, ""
	if p.Cwd == "" {
		p.Cwd = "/"
	}
	if home(p.Env) == "" {
		p.Env = append(p.Env, "HOME="+who.home)
	}
	if p.OOMScoreAdj == nil {
		p.OOMScoreAdj = new(int) // not the agent's own
	}
	// They are for the host's users to read, not for crun to follow.
	s.Annotations = nil
	s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool {
		switch n.Type {
		case specs.UserNamespace:
			return false
		case specs.CgroupNamespace:
			return c.a.o.NoCgroups
		}
		return true
	})
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.MountNamespace})
	if ns := c.pidNS; ns != nil {
		s.Linux.Namespaces = append(s.Linux.Namespaces, *ns)
	}
}

// home finds the setting of HOME.
func home(env []string) string {
	for _, v := range env {
		if strings.HasPrefix(v, "HOME=") {
			return v
		}
	}
	return ""
}

// standard are the mounts that every container has, unless its spec has its own there.
var standard = []specs.Mount{
	{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
	{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
	{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
	{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
	{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
	{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
}

// podMounts are the pod's own files in every container, unless it has others there.
func (a *Agent) podMounts() []specs.Mount {
	file := func(name, destination string, options ...string) specs.Mount {
		return specs.Mount{Destination: destination, Type: "bind", Source: a.path(name), Options: append([]string{"bind", "rprivate"}, options...)}
	}
	return []specs.Mount{
		file("shm", "/dev/shm", "rw", "nosuid", "nodev", "noexec"),
		file("resolv.conf", "/etc/resolv.conf", "rw"),
		file("hostname", "/etc/hostname", "rw"),
	}
}

// arrange puts the mounts into their order: the standard ones, the spec's, then the pod's and the container's,
// what is above before what is below it. A later one at the same place replaces those before.
func (a *Agent) arrange(own, wanted []specs.Mount) []specs.Mount {
	std := standard
	if a.o.NoCgroups {
		std = standard[:len(standard)-1]
	}
	taken := make(map[string]bool)
	for _, m := range wanted {
		taken[path.Clean(m.Destination)] = true
	}
	pod := slices.DeleteFunc(a.podMounts(), func(m specs.Mount) bool { return taken[m.Destination] })
	for _, m := range pod {
		taken[m.Destination] = true
	}
	own = slices.DeleteFunc(slices.Clone(own), func(m specs.Mount) bool { return taken[path.Clean(m.Destination)] })
	for _, m := range own {
		taken[path.Clean(m.Destination)] = true
	}
	std = slices.DeleteFunc(slices.Clone(std), func(m specs.Mount) bool { return taken[m.Destination] })
	ordered := slices.Concat(pod, wanted)
	slices.SortStableFunc(ordered, func(x, y specs.Mount) int { return cmp.Compare(depth(x), depth(y)) })
	return slices.Concat(std, own, ordered)
}

// depth is how many directories the place of a mount is below the root.
func depth(m specs.Mount) int { return strings.Count(path.Clean(m.Destination), "/") }

// execProcess is the process of an exec: what the request leaves out is as the container's own has it.
func execProcess(base *specs.Process, h agent.Header) ([]byte, error) {
	b, err := json.Marshal(base)
	if err != nil {
		return nil, err
	}
	var p specs.Process
	if err := json.Unmarshal(b, &p); err != nil { // a deep copy
		return nil, err
	}
	p.Args, p.ConsoleSize, p.User, p.Capabilities = nil, nil, specs.User{}, nil
	if err := json.Unmarshal(h.Process, &p); err != nil {
		return nil, fmt.Errorf("process: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(p.Args) == 0 {
		return nil, fmt.Errorf("exec without a command: %w", errdefs.ErrInvalidArgument)
	}
	if u := p.User; u.UID == 0 && u.GID == 0 && u.Username == "" && len(u.AdditionalGids) == 0 {
		p.User = base.User
	}
	if p.Capabilities == nil {
		p.Capabilities = base.Capabilities
	}
	if p.Cwd == "" {
		p.Cwd = base.Cwd
	}
	if home(p.Env) == "" {
		p.Env = append(p.Env, home(base.Env))
	}
	p.Terminal = h.TTY
	return json.Marshal(p)
}
