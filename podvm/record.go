package podvm

import (
	"path/filepath"
	"time"

	"github.com/caisson-vm/caisson/network"
	"github.com/caisson-vm/caisson/podvm/share"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// podRecord is what survives of a pod: written before the first side effect, when it is ready, and
// when it has stopped.
type podRecord struct {
	ID      string
	Config  PodConfig
	Created time.Time
	Stage   stage
	Reason  string `json:",omitempty"`
	Message string `json:",omitempty"`
	// Driver and VM are what it takes to attach to the VM.
	Driver  string
	VM      vmm.Config
	Network *network.Attachment `json:",omitempty"`
	Kernel  string              `json:",omitempty"`
	// Guest is the version of the guest that its VM runs, Agent that of the agent in it, as this told it.
	Guest  string  `json:",omitempty"`
	Agent  string  `json:",omitempty"`
	Phases []Phase `json:",omitempty"`
	// Down tells that nothing of the pod is left on the node but its folder.
	Down bool `json:",omitempty"`
	// Disks are the images and block devices attached to the VM, and their addresses in the guest.
	Disks map[string]string `json:",omitempty"`
	// NodeEmptyDirs is Options.NodeEmptyDirs of the time when the pod started: its containers share them.
	NodeEmptyDirs bool `json:",omitempty"`
	// Shares are the directories of the host that are served to the guest.
	Shares []share.Dir `json:",omitempty"`
}

// stage is how far a pod's life has come.
type stage string

const (
	starting stage = "starting" // a daemon that finds this undoes it
	ready    stage = "ready"
	stopped  stage = "stopped"
)

// containerRecord is what survives of a container: written when the guest has made it, and at each
// change of its state. What the guest has and no record names was only half-made.
type containerRecord struct {
	ID, Pod                    string
	Config                     ContainerConfig
	ImageRef                   string
	StopSignal                 string
	State                      State
	Created, Started, Finished time.Time
	ExitCode                   int32
	Reason                     string `json:",omitempty"`
	Message                    string `json:",omitempty"`
	PID                        uint32 `json:",omitempty"`
	User                       *ResolvedUser
	Phases                     []Phase `json:",omitempty"`
	// Process is the OCI process, the pattern for commands that are executed later.
	Process []byte
	// WriteBack are the host's files that take what the container wrote into its copies: the name
	// of the copy and the file's path.
	WriteBack map[string]string `json:",omitempty"`
	// Volumes are the host's folders that are copied into the guest and kept in step.
	Volumes []string `json:",omitempty"`
}

// layout says where a pod's things are. Everything is found from the pod's id.
type layout struct{ root, state string }

// shortID is how much of a pod's id names its runtime folder, which must fit into socket names.
const shortID = 16

func (l layout) pods() string                  { return filepath.Join(l.root, "pods") }
func (l layout) pod(id string) string          { return filepath.Join(l.pods(), id) }
func (l layout) record(id string) string       { return filepath.Join(l.pod(id), "pod.json") }
func (l layout) scratch(id string) string      { return filepath.Join(l.pod(id), "scratch.img") }
func (l layout) image(id, image string) string { return filepath.Join(l.pod(id), image+".erofs") }
func (l layout) containers(id string) string   { return filepath.Join(l.pod(id), "containers") }
func (l layout) run(id string) string          { return filepath.Join(l.state, id[:shortID]) }

func (l layout) container(pod, id string) string {
	return filepath.Join(l.containers(pod), id+".json")
}

func (l layout) logPosition(pod, id string) string {
	return filepath.Join(l.containers(pod), id+".log.pos")
}
