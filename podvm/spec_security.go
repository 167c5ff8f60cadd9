package podvm

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// defaultCapabilities are what a container has that asks for nothing; the same as containerd's.
var defaultCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// allCapabilities of the guest's kernel.
var allCapabilities = append(slices.Clone(defaultCapabilities),
	"CAP_AUDIT_CONTROL", "CAP_AUDIT_READ", "CAP_BLOCK_SUSPEND", "CAP_BPF", "CAP_CHECKPOINT_RESTORE", "CAP_DAC_READ_SEARCH", "CAP_IPC_LOCK",
	"CAP_IPC_OWNER", "CAP_LEASE", "CAP_LINUX_IMMUTABLE", "CAP_MAC_ADMIN", "CAP_MAC_OVERRIDE", "CAP_NET_ADMIN", "CAP_NET_BROADCAST",
	"CAP_PERFMON", "CAP_SYSLOG", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_MODULE", "CAP_SYS_NICE", "CAP_SYS_PACCT", "CAP_SYS_PTRACE",
	"CAP_SYS_RAWIO", "CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_WAKE_ALARM",
)

// secure applies a security context. The user comes from the agent, who has the image's files.
func secure(s *specs.Spec, c Security) error {
	if c.UserNamespace {
		return errUserNamespace
	}
	caps, err := capabilities(c)
	if err != nil {
		return err
	}
	s.Process.Capabilities = caps
	if c.Privileged {
		return nil
	}
	s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = c.MaskedPaths, c.ReadonlyPaths
	if c.AppArmor.Type == "localhost" {
		return fmt.Errorf("AppArmor profile %q: profiles are loaded into the node's kernel, and a pod in a VM has its own; use RuntimeDefault: %w", c.AppArmor.Localhost, errdefs.ErrFailedPrecondition)
	}
	s.Linux.Seccomp, err = filter(s, c.Seccomp)
	return err
}

func capabilities(c Security) (*specs.LinuxCapabilities, error) {
	set := slices.Clone(defaultCapabilities)
	if c.Privileged {
		set = slices.Clone(allCapabilities)
	}
	if slices.ContainsFunc(c.AddCaps, isAll) {
		set = slices.Clone(allCapabilities)
	}
	if slices.ContainsFunc(c.DropCaps, isAll) {
		set = nil
	}
	var err error
	if set, err = change(set, c.AddCaps, true); err != nil {
		return nil, err
	}
	if set, err = change(set, c.DropCaps, false); err != nil {
		return nil, err
	}
	var ambient []string
	if ambient, err = change(nil, c.AddAmbientCaps, true); err != nil {
		return nil, err
	}
	for _, name := range ambient {
		if !slices.Contains(set, name) {
			set = append(set, name)
		}
	}
	return &specs.LinuxCapabilities{Bounding: set, Effective: set, Permitted: set, Inheritable: ambient, Ambient: ambient}, nil
}

func isAll(name string) bool { return strings.TrimPrefix(strings.ToUpper(name), "CAP_") == "ALL" }

// change adds or drops capabilities by name, with or without CAP_.
func change(set, names []string, add bool) ([]string, error) {
	for _, name := range names {
		if isAll(name) {
			continue
		}
		name = "CAP_" + strings.TrimPrefix(strings.ToUpper(name), "CAP_")
		if !slices.Contains(allCapabilities, name) {
			return nil, fmt.Errorf("capability %q is unknown: %w", name, errdefs.ErrInvalidArgument)
		}
		i := slices.Index(set, name)
		switch {
		case add && i < 0:
			set = append(set, name)
		case !add && i >= 0:
			set = slices.Delete(set, i, i+1)
		}
	}
	return set, nil
}

// filter is the seccomp filter of a profile. Without one a container has none, as in containerd.
func filter(s *specs.Spec, p Profile) (*specs.LinuxSeccomp, error) {
	switch p.Type {
	case "", "unconfined":
		return nil, nil
	case "runtime/default":
		return seccomp.DefaultProfile(s), nil
	case "localhost":
		return readProfile(p.Localhost)
	}
	return nil, fmt.Errorf("seccomp profile of type %q: %w", p.Type, errdefs.ErrInvalidArgument)
}

// profileMax bounds a profile's file, in bytes.
const profileMax = 1 << 20

func readProfile(name string) (*specs.LinuxSeccomp, error) {
	path := strings.TrimPrefix(name, "localhost/")
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("seccomp profile %q: want an absolute path on the node: %w", name, errdefs.ErrInvalidArgument)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("seccomp profile: %w: put it onto the node: %w", err, errdefs.ErrFailedPrecondition)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, profileMax+1))
	if err != nil {
		return nil, fmt.Errorf("seccomp profile: %w", err)
	}
	if len(data) > profileMax {
		return nil, fmt.Errorf("seccomp profile %s has more than %d bytes: %w", path, profileMax, errdefs.ErrInvalidArgument)
	}
	var profile specs.LinuxSeccomp
	if err := json.Unmarshal(data, &profile); err != nil {
		return nil, fmt.Errorf("seccomp profile %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	if profile.DefaultAction == "" {
		return nil, fmt.Errorf("seccomp profile %s has no defaultAction: %w", path, errdefs.ErrInvalidArgument)
	}
	return &profile, nil
}
