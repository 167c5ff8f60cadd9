package server

import (
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/imagestore"
	"github.com/caisson-vm/caisson/podvm"
)

// fullPod is a pod as the kubelet asks for it, with every field that is converted.
func fullPod() *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: "web-0", Namespace: "shop", Uid: "7d0c", Attempt: 2},
		Hostname:     "web-0",
		LogDirectory: "/var/log/pods/shop_web-0_7d0c/",
		DnsConfig:    &cri.DNSConfig{Servers: []string{"10.96.0.10", "fd00::a"}, Searches: []string{"shop.svc.cluster.local", "."}, Options: []string{"ndots:5"}},
		PortMappings: []*cri.PortMapping{
			{ContainerPort: 80, HostPort: 8080, HostIp: "127.0.0.1"},
			{ContainerPort: 53, HostPort: 53, Protocol: cri.Protocol_UDP},
			{ContainerPort: 9090}, // no host port
		},
		Labels:      map[string]string{"app": "web"},
		Annotations: map[string]string{"a": "b"},
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: "/kubepods/burstable/pod7d0c",
			Sysctls:      map[string]string{"net.ipv4.ip_local_port_range": "1024 65000", "kernel/shm_rmid_forced": "1"},
			Overhead:     &cri.LinuxContainerResources{MemoryLimitInBytes: 1 << 20},
			Resources:    &cri.LinuxContainerResources{CpuQuota: 150_000, CpuPeriod: 100_000},
			SecurityContext: &cri.LinuxSandboxSecurityContext{
				NamespaceOptions:   &cri.NamespaceOption{Pid: cri.NamespaceMode_POD},
				RunAsUser:          &cri.Int64Value{Value: 1000},
				RunAsGroup:         &cri.Int64Value{Value: 2000},
				SupplementalGroups: []int64{3000},
				Seccomp:            &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault},
			},
		},
	}
}

func TestPodConfig(t *testing.T) {
	got, err := podConfig(fullPod(), "caisson")
	if err != nil {
		t.Fatal(err)
	}
	uid, gid := int64(1000), int64(2000)
	want := podvm.PodConfig{
		Name: "web-0", Namespace: "shop", UID: "7d0c", Attempt: 2,
		Labels: map[string]string{"app": "web"}, Annotations: map[string]string{"a": "b"},
		Hostname: "web-0", LogDir: "/var/log/pods/shop_web-0_7d0c", RuntimeHandler: "caisson",
		DNS: podvm.DNS{Servers: []string{"10.96.0.10", "fd00::a"}, Searches: []string{"shop.svc.cluster.local", "."}, Options: []string{"ndots:5"}},
		PortMappings: []podvm.PortMapping{
			{Protocol: "tcp", ContainerPort: 80, HostPort: 8080, HostIP: "127.0.0.1"},
			{Protocol: "udp", ContainerPort: 53, HostPort: 53},
		},
		Sysctls:      map[string]string{"net.ipv4.ip_local_port_range": "1024 65000", "kernel.shm_rmid_forced": "1"},
		CgroupParent: "/kubepods/burstable/pod7d0c",
		Resources:    &podvm.Resources{CPUQuota: 150_000, CPUPeriod: 100_000},
		Overhead:     &podvm.Resources{Memory: 1 << 20},
		SharePID:     true,
		Security: podvm.Security{
			PIDMode: "pod", Seccomp: podvm.Profile{Type: "runtime/default"},
			User: podvm.User{UID: &uid, GID: &gid, SupplementalGroups: []int64{3000}},
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// TestPodWithoutLimits: what the kubelet makes of no limit and an overhead is no limit.
func TestPodWithoutLimits(t *testing.T) {
	c := fullPod()
	c.Linux.Resources = &cri.LinuxContainerResources{CpuQuota: -5001, CpuPeriod: 100_000, MemoryLimitInBytes: -67108865}
	got, err := podConfig(c, "")
	if want := (podvm.Resources{CPUQuota: -1, CPUPeriod: 100_000, Memory: -1}); err != nil || !reflect.DeepEqual(*got.Resources, want) {
		t.Errorf("got %+v, %v", got.Resources, err)
	}
	if c.Linux.Resources.CpuQuota != -5001 {
		t.Error("the request was changed")
	}
}

func TestPodConfigRefuses(t *testing.T) {
	long := strings.Repeat("a", 300)
	context := func(c *cri.PodSandboxConfig) *cri.LinuxSandboxSecurityContext { return c.Linux.SecurityContext }
	for name, tc := range map[string]struct {
		change func(c *cri.PodSandboxConfig)
		says   string
	}{
		"no metadata":         {func(c *cri.PodSandboxConfig) { c.Metadata = nil }, "metadata"},
		"no name":             {func(c *cri.PodSandboxConfig) { c.Metadata.Name = "" }, "pod name"},
		"path as name":        {func(c *cri.PodSandboxConfig) { c.Metadata.Name = "../x" }, "pod name"},
		"CNI args in name":    {func(c *cri.PodSandboxConfig) { c.Metadata.Name = "a;K8S_POD_NAME=b" }, "pod name"},
		"long namespace":      {func(c *cri.PodSandboxConfig) { c.Metadata.Namespace = long }, "pod namespace"},
		"no uid":              {func(c *cri.PodSandboxConfig) { c.Metadata.Uid = "" }, "pod uid"},
		"long hostname":       {func(c *cri.PodSandboxConfig) { c.Hostname = long }, "hostname"},
		"newline in hostname": {func(c *cri.PodSandboxConfig) { c.Hostname = "a\nb" }, "hostname"},
		"relative log folder": {func(c *cri.PodSandboxConfig) { c.LogDirectory = "logs" }, "log directory"},
		"dns name as server":  {func(c *cri.PodSandboxConfig) { c.DnsConfig.Servers = []string{"dns.example"} }, "DNS server"},
		"newline in search":   {func(c *cri.PodSandboxConfig) { c.DnsConfig.Searches = []string{"a\nnameserver 6.6.6.6"} }, "DNS search"},
		"empty option":        {func(c *cri.PodSandboxConfig) { c.DnsConfig.Options = []string{""} }, "option"},
		"port too high":       {func(c *cri.PodSandboxConfig) { c.PortMappings[0].HostPort = 70000 }, "port mapping"},
		"negative port":       {func(c *cri.PodSandboxConfig) { c.PortMappings[0].HostPort = -1 }, "port mapping"},
		"no container port":   {func(c *cri.PodSandboxConfig) { c.PortMappings[0].ContainerPort = 0 }, "port mapping"},
		"bad host ip":         {func(c *cri.PodSandboxConfig) { c.PortMappings[0].HostIp = "localhost" }, "host IP"},
		"unknown protocol":    {func(c *cri.PodSandboxConfig) { c.PortMappings[0].Protocol = 9 }, "protocol"},
		"sysctl's path":       {func(c *cri.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{"../../etc/passwd": "x"} }, "sysctl"},
		"sysctl's value":      {func(c *cri.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{"net.core.somaxconn": "1\n2"} }, "sysctl"},
		"cgroup parent":       {func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = "/kubepods/../.." }, "cgroup parent"},
		"resources":           {func(c *cri.PodSandboxConfig) { c.Linux.Resources.CpuPeriod = -5 }, "cpu_period"},
		"overhead":            {func(c *cri.PodSandboxConfig) { c.Linux.Overhead.OomScoreAdj = 2000 }, "oom_score_adj"},
		"network of container": {func(c *cri.PodSandboxConfig) {
			context(c).NamespaceOptions.Network = cri.NamespaceMode_CONTAINER
		}, "network namespace"},
		"ipc of target": {func(c *cri.PodSandboxConfig) { context(c).NamespaceOptions.Ipc = cri.NamespaceMode_TARGET }, "ipc namespace"},
		"pid of target": {func(c *cri.PodSandboxConfig) { context(c).NamespaceOptions.Pid = cri.NamespaceMode_TARGET }, "pid namespace"},
		"unknown pid":   {func(c *cri.PodSandboxConfig) { context(c).NamespaceOptions.Pid = 17 }, "pid namespace"},
		"group alone":   {func(c *cri.PodSandboxConfig) { context(c).RunAsUser = nil }, "run_as_group"},
		"negative user": {func(c *cri.PodSandboxConfig) { context(c).RunAsUser.Value = -1 }, "user or group id"},
		"userns without maps": {func(c *cri.PodSandboxConfig) {
			context(c).NamespaceOptions.UsernsOptions = &cri.UserNamespace{Mode: cri.NamespaceMode_POD}
		}, "user namespace"},
		"userns of node with maps": {func(c *cri.PodSandboxConfig) {
			context(c).NamespaceOptions.UsernsOptions = &cri.UserNamespace{Mode: cri.NamespaceMode_NODE, Uids: []*cri.IDMapping{{Length: 1}}}
		}, "user namespace"},
		"userns of container": {func(c *cri.PodSandboxConfig) {
			context(c).NamespaceOptions.UsernsOptions = &cri.UserNamespace{Mode: cri.NamespaceMode_CONTAINER}
		}, "user namespace"},
		"empty id map": {func(c *cri.PodSandboxConfig) {
			context(c).NamespaceOptions.UsernsOptions = &cri.UserNamespace{Uids: []*cri.IDMapping{{}}}
		}, "id mapping"},
		"id map beyond 32 bits": {func(c *cri.PodSandboxConfig) {
			context(c).NamespaceOptions.UsernsOptions = &cri.UserNamespace{Uids: []*cri.IDMapping{{HostId: 1 << 31, Length: 1 << 31}}}
		}, "id mapping"},
		"relative seccomp": {func(c *cri.PodSandboxConfig) {
			context(c).Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "x.json"}
		}, "seccomp"},
		"seccomp without path": {func(c *cri.PodSandboxConfig) {
			context(c).Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost}
		}, "seccomp"},
		"seccomp default with path": {func(c *cri.PodSandboxConfig) {
			context(c).Seccomp = &cri.SecurityProfile{LocalhostRef: "/x.json"}
		}, "seccomp"},
		"seccomp of unknown type": {func(c *cri.PodSandboxConfig) { context(c).Seccomp = &cri.SecurityProfile{ProfileType: 9} }, "seccomp"},
	} {
		t.Run(name, func(t *testing.T) {
			c := fullPod()
			tc.change(c)
			_, err := podConfig(c, "")
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v; want invalid argument, with %q", err, tc.says)
			}
		})
	}
	if _, err := podConfig(fullPod(), "runsc"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "runsc") {
		t.Errorf("unknown handler: %v", err)
	}
	for _, h := range handlers {
		if _, err := podConfig(fullPod(), h); err != nil {
			t.Errorf("handler %q: %v", h, err)
		}
	}
}

// TestNamespacesRoundTrip: the kubelet compares what it asked for with what the status says, and
// kills the pod when they differ.
func TestNamespacesRoundTrip(t *testing.T) {
	maps := []*cri.IDMapping{{HostId: 65536, ContainerId: 0, Length: 65536}}
	for _, o := range []*cri.NamespaceOption{
		{},
		{Pid: cri.NamespaceMode_CONTAINER},
		{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_NODE, Ipc: cri.NamespaceMode_NODE},
		{UsernsOptions: &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: maps, Gids: maps}},
	} {
		c := fullPod()
		c.Linux.SecurityContext.NamespaceOptions = o
		p, err := podConfig(c, "")
		if err != nil {
			t.Fatal(err)
		}
		if got := criNamespaces(&p); !proto.Equal(got, o) {
			t.Errorf("got %v; want %v", got, o)
		}
	}
}

func find(ref string) (imagestore.Image, error) { return newFakeImages().Image(ref) }

// fullContainer is a container with every field that is converted.
func fullContainer() *cri.ContainerConfig {
	return &cri.ContainerConfig{
		Metadata:   &cri.ContainerMetadata{Name: "nginx", Attempt: 3},
		Image:      &cri.ImageSpec{Image: busyboxID, UserSpecifiedImage: "busybox:1"},
		Command:    []string{"/bin/sh"},
		Args:       []string{"-c", "sleep 1"},
		WorkingDir: "/srv",
		Envs:       []*cri.KeyValue{{Key: "A.B", Value: []byte{0xff, '='}}},
		Mounts: []*cri.Mount{
			{HostPath: "/data", ContainerPath: "/d", Propagation: cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
			{ContainerPath: "/models", Image: &cri.ImageSpec{Image: busyboxID}, ImageSubPath: "bin"},
			{HostPath: "/ro", ContainerPath: "/ro", Readonly: true, RecursiveReadOnly: true},
		},
		Devices:     []*cri.Device{{HostPath: "/dev/fuse"}},
		Labels:      map[string]string{"l": "1"},
		Annotations: map[string]string{"a": "2"},
		LogPath:     "nginx/3.log",
		Stdin:       true, StdinOnce: true, Tty: true,
		Linux: &cri.LinuxContainerConfig{
			Resources: &cri.LinuxContainerResources{
				CpuPeriod: 100_000, CpuQuota: -1, CpuShares: 512, MemoryLimitInBytes: 1 << 26, MemorySwapLimitInBytes: 1 << 26, OomScoreAdj: -997,
				CpusetCpus: "0-1,3", HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB", Limit: 0}}, Unified: map[string]string{"memory.high": "1000000"},
			},
			SecurityContext: &cri.LinuxContainerSecurityContext{
				Capabilities:             &cri.Capability{AddCapabilities: []string{"net_admin", "CAP_CHOWN"}, DropCapabilities: []string{"ALL"}},
				NamespaceOptions:         &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET, TargetId: "c1"},
				RunAsUsername:            "www",
				SupplementalGroupsPolicy: cri.SupplementalGroupsPolicy_Strict,
				ReadonlyRootfs:           true, NoNewPrivs: true,
				MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"},
				SelinuxOptions: &cri.SELinuxOption{},
				Apparmor:       &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "localhost/mine"},
			},
		},
	}
}

func TestContainerConfig(t *testing.T) {
	got, err := containerConfig(fullContainer(), find)
	if err != nil {
		t.Fatal(err)
	}
	want := podvm.ContainerConfig{
		Name: "nginx", Attempt: 3, Image: busyboxID, ImageName: "busybox:1",
		Labels: map[string]string{"l": "1"}, Annotations: map[string]string{"a": "2"},
		Command: []string{"/bin/sh"}, Args: []string{"-c", "sleep 1"}, WorkingDir: "/srv",
		Env:     []podvm.EnvVar{{Name: "A.B", Value: []byte{0xff, '='}}},
		LogPath: "nginx/3.log", Stdin: true, StdinOnce: true, TTY: true,
		Mounts: []podvm.Mount{
			{HostPath: "/data", ContainerPath: "/d", Propagation: "rslave"},
			{ContainerPath: "/models", Image: busyboxID, SubPath: "bin", ReadOnly: true, Propagation: "private"},
			{HostPath: "/ro", ContainerPath: "/ro", ReadOnly: true, RecursiveReadOnly: true, Propagation: "private"},
		},
		Devices: []podvm.Device{{HostPath: "/dev/fuse", ContainerPath: "/dev/fuse", Permissions: "rwm"}},
		Resources: podvm.Resources{
			CPUPeriod: 100_000, CPUQuota: -1, CPUShares: 512, Memory: 1 << 26, MemorySwap: 1 << 26, OOMScoreAdj: -997,
			CPUSetCPUs: "0-1,3", HugepageLimits: map[string]uint64{"2MB": 0}, Unified: map[string]string{"memory.high": "1000000"},
		},
		Security: podvm.Security{
			User:    podvm.User{Name: "www", StrictGroups: true},
			AddCaps: []string{"CAP_NET_ADMIN", "CAP_CHOWN"}, DropCaps: []string{"ALL"},
			ReadOnlyRootfs: true, NoNewPrivs: true,
			MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"},
			Seccomp: podvm.Profile{Type: "unconfined"}, AppArmor: podvm.Profile{Type: "localhost", Localhost: "mine"},
			PIDMode: "target", TargetContainer: "c1",
		},
		StopSignal: "SIGQUIT", // the image's
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestContainerConfigRefuses(t *testing.T) {
	sc := func(c *cri.ContainerConfig) *cri.LinuxContainerSecurityContext { return c.Linux.SecurityContext }
	for name, tc := range map[string]struct {
		change func(c *cri.ContainerConfig)
		kind   func(error) bool
		says   string
	}{
		"no metadata":        {func(c *cri.ContainerConfig) { c.Metadata = nil }, errdefs.IsInvalidArgument, "metadata"},
		"name with slash":    {func(c *cri.ContainerConfig) { c.Metadata.Name = "a/b" }, errdefs.IsInvalidArgument, "container name"},
		"no image":           {func(c *cri.ContainerConfig) { c.Image = nil }, errdefs.IsInvalidArgument, "image"},
		"absent image":       {func(c *cri.ContainerConfig) { c.Image.Image = "nope" }, errdefs.IsNotFound, "nope"},
		"NUL in command":     {func(c *cri.ContainerConfig) { c.Command = []string{"a\x00b"} }, errdefs.IsInvalidArgument, "argument"},
		"relative workdir":   {func(c *cri.ContainerConfig) { c.WorkingDir = "srv" }, errdefs.IsInvalidArgument, "working directory"},
		"log outside":        {func(c *cri.ContainerConfig) { c.LogPath = "../../x" }, errdefs.IsInvalidArgument, "log path"},
		"absolute log":       {func(c *cri.ContainerConfig) { c.LogPath = "/x" }, errdefs.IsInvalidArgument, "log path"},
		"env with =":         {func(c *cri.ContainerConfig) { c.Envs[0].Key = "A=B" }, errdefs.IsInvalidArgument, "environment"},
		"env without name":   {func(c *cri.ContainerConfig) { c.Envs[0].Key = "" }, errdefs.IsInvalidArgument, "environment"},
		"NUL in env":         {func(c *cri.ContainerConfig) { c.Envs[0].Value = []byte{0} }, errdefs.IsInvalidArgument, "environment"},
		"relative mount":     {func(c *cri.ContainerConfig) { c.Mounts[0].ContainerPath = "d" }, errdefs.IsInvalidArgument, "container path"},
		"relative host path": {func(c *cri.ContainerConfig) { c.Mounts[0].HostPath = "d" }, errdefs.IsInvalidArgument, "host path"},
		"image and path":     {func(c *cri.ContainerConfig) { c.Mounts[1].HostPath = "/d" }, errdefs.IsInvalidArgument, "host path"},
		"absent image mount": {func(c *cri.ContainerConfig) { c.Mounts[1].Image.Image = "gone" }, errdefs.IsNotFound, "/models"},
		"sub path outside":   {func(c *cri.ContainerConfig) { c.Mounts[1].ImageSubPath = "../x" }, errdefs.IsInvalidArgument, "sub path"},
		"rro but writable":   {func(c *cri.ContainerConfig) { c.Mounts[2].Readonly = false }, errdefs.IsInvalidArgument, "recursive_read_only"},
		"rro but shared": {func(c *cri.ContainerConfig) {
			c.Mounts[2].Propagation = cri.MountPropagation_PROPAGATION_BIDIRECTIONAL
		}, errdefs.IsInvalidArgument, "recursive_read_only"},
		"unknown propagation": {func(c *cri.ContainerConfig) { c.Mounts[0].Propagation = 8 }, errdefs.IsInvalidArgument, "propagation"},
		"mount options":       {func(c *cri.ContainerConfig) { c.Mounts[0].MountOptions = []string{"noexec"} }, errdefs.IsNotImplemented, "noexec"},
		"mapped owners":       {func(c *cri.ContainerConfig) { c.Mounts[0].UidMappings = []*cri.IDMapping{{Length: 1}} }, errdefs.IsNotImplemented, "hostUsers"},
		"mapped groups":       {func(c *cri.ContainerConfig) { c.Mounts[0].GidMappings = []*cri.IDMapping{{Length: 1}} }, errdefs.IsNotImplemented, "hostUsers"},
		"CDI":                 {func(c *cri.ContainerConfig) { c.CDIDevices = []*cri.CDIDevice{{Name: "v/gpu=0"}} }, errdefs.IsNotImplemented, "v/gpu=0"},
		"relative device":     {func(c *cri.ContainerConfig) { c.Devices[0].HostPath = "fuse" }, errdefs.IsInvalidArgument, "device"},
		"device permissions":  {func(c *cri.ContainerConfig) { c.Devices[0].Permissions = "rx" }, errdefs.IsInvalidArgument, "permissions"},
		"stop signal":         {func(c *cri.ContainerConfig) { c.StopSignal = 99 }, errdefs.IsInvalidArgument, "stop signal"},
		"cpuset":              {func(c *cri.ContainerConfig) { c.Linux.Resources.CpusetCpus = "all" }, errdefs.IsInvalidArgument, "cpuset"},
		"quota":               {func(c *cri.ContainerConfig) { c.Linux.Resources.CpuQuota = -2 }, errdefs.IsInvalidArgument, "cpu_quota"},
		"shares":              {func(c *cri.ContainerConfig) { c.Linux.Resources.CpuShares = -2 }, errdefs.IsInvalidArgument, "cpu_shares"},
		"memory":              {func(c *cri.ContainerConfig) { c.Linux.Resources.MemoryLimitInBytes = -2 }, errdefs.IsInvalidArgument, "memory"},
		"hugepages":           {func(c *cri.ContainerConfig) { c.Linux.Resources.HugepageLimits[0].PageSize = "../2MB" }, errdefs.IsInvalidArgument, "hugepage"},
		"unified path": {func(c *cri.ContainerConfig) {
			c.Linux.Resources.Unified = map[string]string{"../memory.max": "1"}
		}, errdefs.IsInvalidArgument, "unified"},
		"unified core file": {func(c *cri.ContainerConfig) {
			c.Linux.Resources.Unified = map[string]string{"cgroup.procs": "1"}
		}, errdefs.IsInvalidArgument, "unified"},
		"capability":      {func(c *cri.ContainerConfig) { sc(c).Capabilities.AddCapabilities = []string{"FLY"} }, errdefs.IsInvalidArgument, "FLY"},
		"SELinux level":   {func(c *cri.ContainerConfig) { sc(c).SelinuxOptions.Level = "s0:c1,c2" }, errdefs.IsNotImplemented, "s0:c1,c2"},
		"SELinux type":    {func(c *cri.ContainerConfig) { sc(c).SelinuxOptions.Type = "container_t" }, errdefs.IsNotImplemented, "container_t"},
		"node's network":  {func(c *cri.ContainerConfig) { sc(c).NamespaceOptions.Network = cri.NamespaceMode_NODE }, errdefs.IsInvalidArgument, "network namespace"},
		"node's ipc":      {func(c *cri.ContainerConfig) { sc(c).NamespaceOptions.Ipc = cri.NamespaceMode_NODE }, errdefs.IsInvalidArgument, "ipc namespace"},
		"own network":     {func(c *cri.ContainerConfig) { sc(c).NamespaceOptions.Network = cri.NamespaceMode_CONTAINER }, errdefs.IsInvalidArgument, "network namespace"},
		"no target":       {func(c *cri.ContainerConfig) { sc(c).NamespaceOptions.TargetId = "" }, errdefs.IsInvalidArgument, "target_id"},
		"group alone":     {func(c *cri.ContainerConfig) { sc(c).RunAsUsername = ""; sc(c).RunAsGroup = &cri.Int64Value{} }, errdefs.IsInvalidArgument, "run_as_group"},
		"groups":          {func(c *cri.ContainerConfig) { sc(c).SupplementalGroups = []int64{-1} }, errdefs.IsInvalidArgument, "group id"},
		"groups policy":   {func(c *cri.ContainerConfig) { sc(c).SupplementalGroupsPolicy = 5 }, errdefs.IsInvalidArgument, "policy"},
		"masked path":     {func(c *cri.ContainerConfig) { sc(c).MaskedPaths = []string{"proc"} }, errdefs.IsInvalidArgument, "masked"},
		"newline in user": {func(c *cri.ContainerConfig) { sc(c).RunAsUsername = "a\nb" }, errdefs.IsInvalidArgument, "user name"},
	} {
		t.Run(name, func(t *testing.T) {
			c := fullContainer()
			tc.change(c)
			_, err := containerConfig(c, find)
			if !tc.kind(err) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v; want another kind, with %q", err, tc.says)
			}
		})
	}
}

// TestSELinux: labels are refused for pods, too; what asks for no confinement gets it.
func TestSELinux(t *testing.T) {
	p := fullPod()
	p.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Role: "system_r"}
	if _, err := podConfig(p, ""); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "seLinuxOptions") {
		t.Errorf("got %v", err)
	}
	for _, o := range []*cri.SELinuxOption{nil, {}, {Type: "spc_t", Level: "s0"}} {
		if err := checkSELinux(o); err != nil {
			t.Errorf("%v: %v", o, err)
		}
	}
}

func TestProfiles(t *testing.T) {
	type lsc = cri.LinuxContainerSecurityContext
	for name, tc := range map[string]struct {
		context           *lsc
		seccomp, apparmor podvm.Profile
	}{
		"none":       {&lsc{}, podvm.Profile{Type: "unconfined"}, podvm.Profile{}},
		"no context": {nil, podvm.Profile{Type: "unconfined"}, podvm.Profile{}},
		"default": {
			&lsc{Seccomp: &cri.SecurityProfile{}, Apparmor: &cri.SecurityProfile{}},
			podvm.Profile{Type: "runtime/default"}, podvm.Profile{Type: "runtime/default"},
		},
		"privileged": {
			&lsc{Privileged: true, Seccomp: &cri.SecurityProfile{}, Apparmor: &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}},
			podvm.Profile{Type: "unconfined"}, podvm.Profile{Type: "unconfined"},
		},
		"localhost": {
			&lsc{Seccomp: &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "/p.json"}},
			podvm.Profile{Type: "localhost", Localhost: "/p.json"}, podvm.Profile{},
		},
	} {
		s, err := containerSecurity(tc.context)
		if err != nil || s.Seccomp != tc.seccomp || s.AppArmor != tc.apparmor {
			t.Errorf("%s: seccomp %v, apparmor %v, %v", name, s.Seccomp, s.AppArmor, err)
		}
	}
}

// TestOldProfiles: clients older than the present fields write strings.
func TestOldProfiles(t *testing.T) {
	for text, want := range map[string]podvm.Profile{
		"runtime/default":   {Type: "runtime/default"},
		"docker/default":    {Type: "runtime/default"},
		"unconfined":        {Type: "unconfined"},
		"localhost//p.json": {Type: "localhost", Localhost: "/p.json"},
	} {
		sc := &cri.LinuxContainerSecurityContext{}
		for _, field := range []string{"seccomp_profile_path", "apparmor_profile"} {
			setField(sc, field, text)
		}
		s, err := containerSecurity(sc)
		if err != nil || s.Seccomp != want || s.AppArmor != want {
			t.Errorf("%s: seccomp %v, apparmor %v, %v", text, s.Seccomp, s.AppArmor, err)
		}
	}
	for _, text := range []string{"localhost/", "default", "localhost/x\n"} {
		sc := &cri.LinuxContainerSecurityContext{}
		setField(sc, "apparmor_profile", text)
		if _, err := containerSecurity(sc); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestSignals(t *testing.T) {
	for n, name := range cri.Signal_name {
		s := cri.Signal(n)
		if s == cri.Signal_SIGNAL_RUNTIME_DEFAULT {
			continue
		}
		if got, err := parseSignal(signalName(s)); err != nil || signalName(got) != signalName(s) {
			t.Errorf("%s -> %q -> %v, %v", name, signalName(s), got, err)
		}
	}
	for in, want := range map[string]string{
		"SIGTERM": "SIGTERM", "term": "SIGTERM", "15": "SIGTERM", "9": "SIGKILL", "RTMIN+3": "SIGRTMIN+3", "SIGRTMAX-2": "SIGRTMAX-2",
		"34": "SIGRTMIN+0", "RTMIN": "SIGRTMIN+0", "SIGIOT": "SIGABRT", "6": "SIGABRT", "37": "SIGRTMIN+3", "62": "SIGRTMAX-2", "64": "SIGRTMAX-0",
	} {
		if s, err := parseSignal(in); err != nil || signalName(s) != want {
			t.Errorf("%s: %v, %v; want %s", in, s, err, want)
		}
	}
	for _, in := range []string{"", "0", "65", "-3", "SIGFOO", "33", "SIG", "RUNTIME_DEFAULT", "SIGTERM+1", "SIGRTMIN+16"} {
		if s, err := parseSignal(in); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, %v", in, s, err)
		}
	}
	if s, err := stopSignal(cri.Signal_SIGNAL_SIGUSR1, "SIGQUIT"); err != nil || s != "SIGUSR1" {
		t.Error(s, err)
	}
	if s, err := stopSignal(0, ""); err != nil || s != "SIGTERM" {
		t.Error(s, err)
	}
	if _, err := stopSignal(0, "nonsense"); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}

func TestAuth(t *testing.T) {
	for name, tc := range map[string]struct {
		in   *cri.AuthConfig
		want *imagestore.Auth
	}{
		"none":     {nil, nil},
		"empty":    {&cri.AuthConfig{ServerAddress: "r"}, nil},
		"password": {&cri.AuthConfig{Username: "u", Password: "p", Auth: "eDp5"}, &imagestore.Auth{Username: "u", Password: "p"}},
		"basic":    {&cri.AuthConfig{Auth: "eDp5Onp6"}, &imagestore.Auth{Username: "x", Password: "y:zz"}},
		"identity": {&cri.AuthConfig{IdentityToken: "t"}, &imagestore.Auth{IdentityToken: "t"}},
		"registry": {&cri.AuthConfig{RegistryToken: "t", ServerAddress: "r"}, &imagestore.Auth{RegistryToken: "t", ServerAddress: "r"}},
	} {
		if got, err := auth(tc.in); err != nil || !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	for _, bad := range []string{"%%%", "eA=="} {
		if _, err := auth(&cri.AuthConfig{Auth: bad}); !errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), bad) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestImageUser(t *testing.T) {
	for user, want := range map[string]struct {
		uid  *cri.Int64Value
		name string
	}{
		"": {}, "0": {uid: &cri.Int64Value{}}, "1000:1000": {uid: &cri.Int64Value{Value: 1000}}, "www:www": {name: "www"}, ":5": {},
		strings.Repeat("a", 4<<20): {name: strings.Repeat("a", 256)}, strings.Repeat("a", 255) + "\u00e9": {name: strings.Repeat("a", 255)},
	} {
		if uid, name := imageUser(user); !proto.Equal(uid, want.uid) || name != want.name {
			t.Errorf("%.300q: %v, %q", user, uid, name)
		}
	}
}

func setField(m proto.Message, name, value string) {
	for i := range m.ProtoReflect().Descriptor().Fields().Len() {
		if fd := m.ProtoReflect().Descriptor().Fields().Get(i); fd.TextName() == name {
			m.ProtoReflect().Set(fd, protoString(value))
		}
	}
}
