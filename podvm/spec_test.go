package podvm

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestArguments(t *testing.T) {
	image := ocispec.ImageConfig{Entrypoint: []string{"entry", "e1"}, Cmd: []string{"cmd"}}
	for _, c := range []struct {
		name          string
		command, args []string
		image         ocispec.ImageConfig
		want          string
	}{
		{"image alone", nil, nil, image, "entry e1 cmd"},
		{"arguments replace cmd", nil, []string{"a"}, image, "entry e1 a"},
		{"a command replaces both", []string{"c"}, nil, image, "c"},
		{"both", []string{"c"}, []string{"a", "b"}, image, "c a b"},
		{"cmd alone", nil, nil, ocispec.ImageConfig{Cmd: []string{"cmd"}}, "cmd"},
		{"arguments alone", nil, []string{"a"}, ocispec.ImageConfig{}, "a"},
	} {
		got, err := arguments(ContainerConfig{Command: c.command, Args: c.args}, c.image)
		if err != nil || strings.Join(got, " ") != c.want {
			t.Errorf("%s: got %q, %v", c.name, got, err)
		}
	}
	if _, err := arguments(ContainerConfig{}, ocispec.ImageConfig{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("nothing to run: %v", err)
	}
}

func TestEnvironment(t *testing.T) {
	image := ocispec.ImageConfig{Env: []string{"PATH=/image", "A=image", "B=image", "malformed", "=x", "EMPTY="}}
	c := ContainerConfig{TTY: true, Env: []EnvVar{{"A", []byte("container")}, {"C", []byte("a=b\xff")}, {"A", []byte("last")}}}
	got := environment(PodConfig{Hostname: "host"}, c, image)
	want := []string{"PATH=/image", "HOSTNAME=host", "TERM=xterm", "A=last", "B=image", "EMPTY=", "C=a=b\xff"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := environment(PodConfig{}, ContainerConfig{}, ocispec.ImageConfig{}); !slices.Equal(got, []string{defaultPath}) {
		t.Errorf("got %q", got)
	}
}

func TestWorkingDir(t *testing.T) {
	for _, c := range []struct{ container, image, want string }{
		{"", "", "/"}, {"", "/i", "/i"}, {"/c", "/i", "/c"}, {"", "rel", "/rel"}, {"../..", "", "/"},
	} {
		if got := workingDir(ContainerConfig{WorkingDir: c.container}, ocispec.ImageConfig{WorkingDir: c.image}); got != c.want {
			t.Errorf("%+v: got %s", c, got)
		}
	}
}

func TestCapabilities(t *testing.T) {
	has := func(caps []string, name string) bool { return slices.Contains(caps, name) }
	for _, c := range []struct {
		name     string
		security Security
		want     []string // all of them
		has, not []string
	}{
		{name: "default", want: defaultCapabilities},
		{name: "privileged", security: Security{Privileged: true}, want: allCapabilities},
		{name: "add one, without its prefix, in any case", security: Security{AddCaps: []string{"net_admin"}}, has: []string{"CAP_NET_ADMIN", "CAP_CHOWN"}},
		{name: "drop one", security: Security{DropCaps: []string{"CAP_CHOWN"}}, has: []string{"CAP_KILL"}, not: []string{"CAP_CHOWN"}},
		{name: "drop all", security: Security{DropCaps: []string{"ALL"}}, want: []string{}},
		{name: "drop all, add one", security: Security{DropCaps: []string{"all"}, AddCaps: []string{"CAP_NET_BIND_SERVICE"}}, want: []string{"CAP_NET_BIND_SERVICE"}},
		{name: "add all, drop one", security: Security{AddCaps: []string{"ALL"}, DropCaps: []string{"SYS_TIME"}}, has: []string{"CAP_SYS_ADMIN"}, not: []string{"CAP_SYS_TIME"}},
		{name: "add ALL, drop ALL", security: Security{AddCaps: []string{"ALL"}, DropCaps: []string{"ALL"}}, want: []string{}},
	} {
		got, err := capabilities(c.security)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		for _, set := range [][]string{got.Bounding, got.Effective, got.Permitted} {
			sorted, want := slices.Sorted(slices.Values(set)), slices.Sorted(slices.Values(c.want))
			if c.want != nil && !slices.Equal(sorted, want) {
				t.Errorf("%s: got %q", c.name, set)
			}
			for _, name := range c.has {
				if !has(set, name) {
					t.Errorf("%s: no %s", c.name, name)
				}
			}
			for _, name := range c.not {
				if has(set, name) {
					t.Errorf("%s: has %s", c.name, name)
				}
			}
		}
		if len(got.Ambient)+len(got.Inheritable) > 0 {
			t.Errorf("%s: children inherit %q", c.name, got.Ambient)
		}
	}
	got, err := capabilities(Security{AddAmbientCaps: []string{"NET_RAW", "SYS_TIME"}, DropCaps: []string{"ALL"}})
	if err != nil || !slices.Equal(got.Ambient, []string{"CAP_NET_RAW", "CAP_SYS_TIME"}) || !has(got.Permitted, "CAP_SYS_TIME") {
		t.Errorf("ambient: %+v, %v", got, err)
	}
	if _, err := capabilities(Security{AddCaps: []string{"CAP_FLY"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an unknown capability: %v", err)
	}
	if seen := slices.Compact(slices.Sorted(slices.Values(allCapabilities))); len(seen) != 41 || len(allCapabilities) != 41 {
		t.Errorf("%d capabilities, the kernel has 41", len(seen))
	}
}

func TestSecurityOfSpec(t *testing.T) {
	c := ContainerConfig{Command: []string{"x"}, Security: Security{
		MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"}, Seccomp: Profile{Type: "runtime/default"},
		NoNewPrivs: true, ReadOnlyRootfs: true,
	}}
	s, err := ociSpec(PodConfig{}, c, ocispec.ImageConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if s.Linux.Seccomp == nil || len(s.Linux.Seccomp.Syscalls) == 0 || len(s.Linux.MaskedPaths) != 1 || len(s.Linux.ReadonlyPaths) != 1 || !s.Process.NoNewPrivileges || !s.Root.Readonly {
		t.Errorf("got %+v", s.Linux)
	}
	if sys := mountAt(s, "/sys"); !slices.Contains(sys.Options, "ro") {
		t.Errorf("/sys is %q", sys.Options)
	}
	if d := s.Linux.Resources.Devices; d[0].Allow || len(d) < 2 {
		t.Errorf("devices: %+v", d)
	}
	c.Security.Privileged = true
	if s, err = ociSpec(PodConfig{}, c, ocispec.ImageConfig{}); err != nil {
		t.Fatal(err)
	}
	if s.Linux.Seccomp != nil || s.Linux.MaskedPaths != nil || len(s.Linux.Resources.Devices) != 1 || !slices.Contains(mountAt(s, "/sys").Options, "rw") {
		t.Errorf("a privileged container is confined: %+v", s.Linux)
	}
	for what, bad := range map[string]Security{
		"user namespace": {UserNamespace: true}, "AppArmor of the node": {AppArmor: Profile{Type: "localhost", Localhost: "x"}},
		"relative profile": {Seccomp: Profile{Type: "localhost", Localhost: "x.json"}}, "missing profile": {Seccomp: Profile{Type: "localhost", Localhost: "/nowhere.json"}},
		"unknown profile": {Seccomp: Profile{Type: "fancy"}},
	} {
		if _, err := ociSpec(PodConfig{}, ContainerConfig{Command: []string{"x"}, Security: bad}, ocispec.ImageConfig{}); err == nil {
			t.Errorf("%s was taken", what)
		}
	}
}

func mountAt(s *specs.Spec, path string) specs.Mount {
	i := slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == path })
	if i < 0 {
		return specs.Mount{}
	}
	return s.Mounts[i]
}

func TestSeccompProfileOfNode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "p.json")
	write := func(data []byte) {
		t.Helper()
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow}}}
	data, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	write(data)
	got, err := readProfile("localhost/" + path)
	if err != nil || got.DefaultAction != want.DefaultAction || len(got.Syscalls) != 1 {
		t.Errorf("got %+v, %v", got, err)
	}
	write([]byte("{}"))
	if _, err := readProfile(path); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a profile without a default action: %v", err)
	}
	write(append(data, make([]byte, profileMax)...))
	if _, err := readProfile(path); err == nil {
		t.Error("a huge profile was taken")
	}
}

func TestResources(t *testing.T) {
	l, err := resources(Resources{
		CPUPeriod: 100_000, CPUQuota: 50_000, CPUShares: 512, Memory: 64 << 20, CPUSetCPUs: "0-1", CPUSetMems: "0",
		HugepageLimits: map[string]uint64{"2MB": 0}, Unified: map[string]string{"memory.high": "1"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if *l.CPU.Quota != 50_000 || *l.CPU.Period != 100_000 || *l.CPU.Shares != 512 || l.CPU.Cpus+l.CPU.Mems != "" ||
		*l.Memory.Limit != 64<<20 || *l.Memory.Swap != 64<<20 || l.HugepageLimits != nil || l.Unified["memory.high"] != "1" {
		data, _ := json.Marshal(l)
		t.Errorf("got %s", data)
	}
	if l, err = resources(Resources{}); err != nil || l.Memory != nil || l.CPU.Quota != nil || l.CPU.Shares != nil || l.CPU.Period != nil {
		t.Errorf("no limits became %+v, %v", l, err)
	}
	if l, err = resources(Resources{Memory: -1, CPUQuota: -1, MemorySwap: -1}); err != nil || *l.Memory.Limit != -1 || *l.Memory.Swap != -1 || *l.CPU.Quota != -1 {
		t.Errorf("limits that are lifted became %+v, %v", l.Memory, err)
	}
	if l, err = resources(Resources{Memory: 1 << 20, MemorySwap: -1}); err != nil || *l.Memory.Swap != -1 {
		t.Errorf("unlimited swap became %+v, %v", l.Memory, err)
	}
	if _, err = resources(Resources{Memory: 2 << 20, MemorySwap: 1 << 20}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("less swap than memory: %v", err)
	}
	if _, err = resources(Resources{HugepageLimits: map[string]uint64{"1GB": 0, "2MB": 4 << 20}}); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "2MB") {
		t.Errorf("huge pages that a guest has not: %v", err)
	}
}
