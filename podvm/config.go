package podvm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/caisson-vm/caisson/podvm/vmm"
)

// PodConfig is what a pod is to be. It is persisted: plain values only.
type PodConfig struct {
	// Name, Namespace, UID and Attempt identify the pod for the kubelet; together they are unique.
	Name, Namespace, UID string
	Attempt              uint32
	Labels, Annotations  map[string]string
	// Hostname is the pod's host name; empty: the first 12 digits of its id.
	Hostname string
	// LogDir is an absolute directory on the host for its containers' logs; empty: no logs.
	LogDir string
	// RuntimeHandler is the RuntimeClass's handler, "" for the default.
	RuntimeHandler string
	DNS            DNS
	PortMappings   []PortMapping
	Sysctls        map[string]string
	// CgroupParent is the kubelet's cgroup for the pod, as the CRI gives it (a cgroupfs path, or a
	// systemd slice name).
	CgroupParent string
	// Resources are the sum over the pod's containers, Overhead what the RuntimeClass adds. Nil when unknown.
	Resources, Overhead *Resources
	// SharePID puts all containers into one PID namespace.
	SharePID bool
	// HostNetwork, HostPID and HostIPC pods, and Privileged ones by configuration, are for the node itself.
	HostNetwork, HostPID, HostIPC, Privileged bool
	// ShmSize in bytes; 0: 64 MiB.
	ShmSize int64
	// Security is what the pod as a whole asks for; containers carry their own.
	Security Security
}

// DNS is the pod's resolv.conf.
type DNS struct {
	Servers, Searches, Options []string
}

// PortMapping forwards a port of the node to one of the pod.
type PortMapping struct {
	Protocol                string // "tcp", "udp", "sctp"
	ContainerPort, HostPort int32
	HostIP                  string
}

// ContainerConfig is what a container is to be. It is persisted: plain values only.
type ContainerConfig struct {
	Name    string
	Attempt uint32
	// Image is the image's id in the store (the config digest, "sha256:..."); ImageName what the
	// pod's author wrote.
	Image, ImageName    string
	Labels, Annotations map[string]string
	// Command and Args replace the image's entrypoint and cmd as Kubernetes has it.
	Command, Args []string
	WorkingDir    string
	Env           []EnvVar
	// LogPath is relative to the pod's LogDir; empty: no log.
	LogPath               string
	Stdin, StdinOnce, TTY bool
	Mounts                []Mount
	Devices               []Device
	Resources             Resources
	Security              Security
	// StopSignal by name ("SIGTERM"); empty: the image's, else SIGTERM.
	StopSignal string
}

// EnvVar is one environment variable. Values are bytes, not text.
type EnvVar struct {
	Name  string
	Value []byte
}

// Mount is a host path, or an image, inside the container.
type Mount struct {
	// HostPath is absolute; empty for an image.
	HostPath, ContainerPath string
	// Image is the id of an image to mount read-only, SubPath a path inside it.
	Image, SubPath              string
	ReadOnly, RecursiveReadOnly bool
	// Propagation: "private", "rslave" (HostToContainer), "rshared" (Bidirectional).
	Propagation string
	// SELinuxRelabel asks for a label on the content, which no kernel of a guest has a use for.
	SELinuxRelabel bool
}

// IDMap maps a range of ids of a user namespace.
type IDMap struct {
	Container, Host, Length uint32
}

// Device is a host device to be given to the container.
type Device struct {
	HostPath, ContainerPath string
	// Permissions of "rwm".
	Permissions string
}

// Security is a security context.
type Security struct {
	User              User
	Privileged        bool
	ReadOnlyRootfs    bool
	NoNewPrivs        bool
	AddCaps, DropCaps []string // "CAP_X", or "ALL"
	AddAmbientCaps    []string
	MaskedPaths       []string
	ReadonlyPaths     []string
	Seccomp, AppArmor Profile
	PIDMode           string // "pod", "container", "node", "target"
	TargetContainer   string
	UserNamespace     bool // mode POD: map ids by UIDs and GIDs
	UIDs, GIDs        []IDMap
}

// User is who the container's process runs as; nil ids and "" mean: as the image says.
type User struct {
	UID, GID           *int64
	Name               string
	SupplementalGroups []int64
	StrictGroups       bool
}

// Profile is a seccomp or AppArmor profile.
type Profile struct {
	// Type: "" or "runtime/default", "unconfined", "localhost".
	Type string
	// Localhost is the path (seccomp) or name (AppArmor) of a local profile.
	Localhost string
}

// Resources are the limits of a container or a pod. Zero means no limit.
type Resources struct {
	CPUPeriod, CPUQuota int64 // microseconds
	CPUShares           int64
	Memory, MemorySwap  int64 // bytes
	OOMScoreAdj         int64
	CPUSetCPUs          string
	CPUSetMems          string
	HugepageLimits      map[string]uint64 // page size ("2MB") -> bytes
	Unified             map[string]string // cgroup v2 files
}

// State is where a pod or container is in its life.
type State string

// The states. Pods are Ready or NotReady, containers Created, Running, Exited or Unknown.
const (
	Ready    State = "ready"
	NotReady State = "notready"
	Created  State = "created"
	Running  State = "running"
	Exited   State = "exited"
	Unknown  State = "unknown"
)

// PodStatus is a snapshot of a pod; it does not change after it was handed out.
type PodStatus struct {
	ID      string
	Config  PodConfig
	State   State
	Created time.Time
	// Reason and Message say why a pod is not ready: "VMGone", "OOMKilled", "Stopped", "Unreadable", ...
	Reason, Message string
	// IPs, the primary first.
	IPs []string
	// NetNS is the path of its network namespace on the host.
	NetNS string
	// Driver is the VMM's ("qemu", "cloud-hypervisor"); VMM and its configuration are for debugging.
	Driver string
	VMM    vmm.Info
	// Kernel is its guest's release, Guest the guest's version and Agent that of the agent in it; "" of pods
	// that daemons started which did not record it.
	Kernel, Guest, Agent string
	Cgroup               string
	// Phases of its start, in order, for those who look for time.
	Phases []Phase
}

// Phase is one step of a pod's start. Steps in parallel overlap.
type Phase struct {
	Name        string
	Start, Took time.Duration // Start counts from the call
	Failed      bool          `json:",omitempty"`
}

// ContainerStatus is a snapshot of a container.
type ContainerStatus struct {
	ID, Pod                    string
	Config                     ContainerConfig
	State                      State
	Created, Started, Finished time.Time
	ExitCode                   int32
	// Reason: "Completed", "Error", "OOMKilled", "VMGone", "StartError"; Message says more.
	Reason, Message string
	// LogPath is absolute; empty: no log.
	LogPath string
	// ImageRef names the image by digest (repo@sha256:...), or by its id where it has none.
	ImageRef string
	// PID of the main process, in the guest.
	PID uint32
	// User the process runs as, once it was created.
	User *ResolvedUser
	// Phases of its creation, in order.
	Phases []Phase
}

// ResolvedUser is a user as the guest resolved it.
type ResolvedUser struct {
	UID, GID           int64
	SupplementalGroups []int64
}

// orNode is the DNS configuration, or the node's own where the kubelet gives none.
func (d DNS) orNode() (DNS, error) {
	if len(d.Servers)+len(d.Searches)+len(d.Options) > 0 {
		return d, nil
	}
	data, err := os.ReadFile("/etc/resolv.conf")
	if errors.Is(err, fs.ErrNotExist) {
		return d, nil
	}
	if err != nil {
		return d, fmt.Errorf("DNS of the node: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			d.Servers = append(d.Servers, fields[1])
		case "search":
			d.Searches = fields[1:]
		case "options":
			d.Options = append(d.Options, fields[1:]...)
		}
	}
	return d, nil
}
