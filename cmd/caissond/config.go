package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/caisson-vm/caisson/podvm/vmm/cloudhv"
)

// defaultConfig is where the configuration is read from when --config is not given. It may be
// absent: every key is optional.
const defaultConfig = "/etc/caisson/config.toml"

// Config is the daemon's configuration. Each key has one reader, in serve.go or check.go.
type Config struct {
	Listen string `toml:"listen" comment:"CRI socket, mode 0600."`
	Root   string `toml:"root" comment:"Images, pods and their records: survives a reboot."`
	State  string `toml:"state" comment:"Sockets of running pods: a tmpfs, gone after a reboot."`
	Driver string `toml:"driver" comment:"auto, cloud-hypervisor or qemu. auto takes Cloud Hypervisor where KVM truly works, else QEMU."`
	Guest  string `toml:"guest" comment:"Folder of the guest's kernel and initramfs, made by 'caissond guest build'."`
	VM     struct {
		CPUs      int      `toml:"cpus" comment:"vCPUs of a pod that neither has a CPU limit nor requests more."`
		Memory    Size     `toml:"memory" comment:"Memory of a pod without a memory limit, and what a container without one adds to the limits of others. It costs nothing until it is used."`
		MaxCPUs   int      `toml:"max_cpus" comment:"The most that a pod gets, also where its limits are above. 0: all of the node's. No more than a VM can have: 254 with Cloud Hypervisor, 255 with QEMU."`
		MaxMemory Size     `toml:"max_memory" comment:"The most that a pod gets, also where its limits are above. 0: all of the node's."`
		MaxClone  Size     `toml:"max_clone_memory" comment:"The most that a clone can grow to; a pod whose limits are above boots, which takes longer. The VMM of each clone keeps 32 KiB for each GiB of it. 0: as max_memory."`
		Template  string   `toml:"template" comment:"Who shares a template, the booted VM that pods are clones of: node, namespace, or pod (every pod boots by itself)."`
		Warm      int      `toml:"warm" comment:"Clones that are kept ready for pods to come, at most 16: such a pod starts in a third of the time, each takes the memory of an idle pod. -1: one with Cloud Hypervisor and vm.template = node, else none. Not with vm.template = namespace or pod."`
		Watchdog  Duration `toml:"watchdog" comment:"A guest that answers nothing for so long, while somebody waits for it, is taken for hung: its VM is killed, and its pod is for the kubelet to replace. 0s: never."`
		DAX       bool     `toml:"dax" comment:"With Cloud Hypervisor, pods of one image share its pages on the node, as long as a pod's images are not larger than twice its VM's memory. false: each guest caches what it reads, in memory of its own."`
		EmptyDirs string   `toml:"empty_dirs" comment:"Where emptyDirs of a pod are, but for those of medium Memory. guest: on its scratch disk, which is fast; the kubelet does not see what they hold, so that sizeLimit has no effect, and they end with the VM. node: in the kubelet's folder, served to the pod as host directories are."`
		Scratch   Size     `toml:"scratch" comment:"Largest writable layers and emptyDirs of a pod together: a sparse file."`
		QEMU      string   `toml:"qemu" comment:"QEMU's binary; a name is looked up in PATH."`
		CloudHV   string   `toml:"cloud_hypervisor" comment:"Cloud Hypervisor's binary; a name is looked up in PATH."`
	} `toml:"vm"`
	CNI struct {
		ConfDir      string   `toml:"conf_dir"`
		BinDirs      []string `toml:"bin_dirs"`
		NetNSDir     string   `toml:"netns_dir" comment:"Folder of the pods' network namespaces. Agents of some networks (Antrea, Kube-OVN) see /var/run/netns only. Empty: netns in the state folder. Remove all pods before it changes."`
		AllowFilters bool     `toml:"allow_filters" comment:"A VM's packets never pass filters (iptables, nftables) that a network plugin has put into the pod's namespace, as those of service meshes do. false: such a pod is refused. true: it starts, and its filters have no effect."`
	} `toml:"cni"`
	Images struct {
		RegistriesConf string   `toml:"registries_conf" comment:"containers-registries.conf(5): mirrors, insecure and blocked registries, aliases of short names (other short names are docker.io's). Empty: the system's."`
		Policy         string   `toml:"policy" comment:"containers-policy.json(5). Empty: the system's."`
		Pinned         []string `toml:"pinned" comment:"Images that the kubelet must not collect as garbage."`
	} `toml:"images"`
	Metrics struct {
		Listen string `toml:"listen" comment:"Prometheus endpoint. Empty: none."`
	} `toml:"metrics"`
	Log struct {
		Level slog.Level `toml:"level" comment:"debug, info, warn or error."`
	} `toml:"log"`
}

// warm is how many clones are kept ready with this driver. By emulation one takes ten times the memory.
func (c Config) warm(driver string) int {
	if c.VM.Warm >= 0 {
		return c.VM.Warm
	}
	if driver == cloudhv.Name && c.VM.Template == "node" {
		return 1
	}
	return 0
}

// Size is a number of bytes, written as Kubernetes writes it: "512Mi", "20G".
type Size int64

// UnmarshalText reads a Kubernetes quantity.
func (s *Size) UnmarshalText(text []byte) error {
	q, err := resource.ParseQuantity(string(text))
	if err != nil || q.Sign() < 0 {
		return fmt.Errorf("size %q: want a quantity such as 512Mi or 20Gi", text)
	}
	*s = Size(q.Value())
	return nil
}

// MarshalText writes a Kubernetes quantity.
func (s Size) MarshalText() ([]byte, error) {
	return []byte(resource.NewQuantity(int64(s), resource.BinarySI).String()), nil
}

// Duration is a time, written as Go writes it: "90s", "1m".
type Duration time.Duration

// UnmarshalText reads a duration that is not negative.
func (d *Duration) UnmarshalText(text []byte) error {
	t, err := time.ParseDuration(string(text))
	if err != nil || t < 0 {
		return fmt.Errorf("duration %q: want one such as 90s or 1m", text)
	}
	*d = Duration(t)
	return nil
}

// MarshalText writes a duration.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

func defaults() Config {
	var c Config
	c.Listen = "/run/caisson/caisson.sock"
	c.Root = "/var/lib/caisson"
	c.State = "/run/caisson"
	c.Driver = "auto"
	c.Guest = "/usr/local/lib/caisson/guest"
	c.VM.CPUs = 1
	c.VM.Memory = 512 << 20
	c.VM.MaxClone = 8 << 30
	c.VM.Template = "node"
	c.VM.Warm = -1
	c.VM.Watchdog = Duration(time.Minute)
	c.VM.DAX = true
	c.VM.EmptyDirs = "guest"
	c.VM.Scratch = 64 << 30
	c.VM.QEMU = "qemu-system-x86_64"
	c.VM.CloudHV = "cloud-hypervisor"
	c.CNI.ConfDir = "/etc/cni/net.d"
	c.CNI.BinDirs = []string{"/opt/cni/bin", "/usr/lib/cni"}
	c.Images.Pinned = []string{}
	c.Metrics.Listen = "127.0.0.1:9477"
	return c
}

// loadConfig reads the file over the defaults. Only the default file may be missing.
func loadConfig(path string) (Config, error) {
	c := defaults()
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && path == defaultConfig {
		return c, nil
	}
	if err != nil {
		return c, fmt.Errorf("read configuration: %w", err)
	}
	d := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return c, fmt.Errorf("configuration %s: %w", path, explain(err))
	}
	if err := c.validate(); err != nil {
		return c, fmt.Errorf("configuration %s: %w", path, err)
	}
	return c, nil
}

// explain gives a decoding error its line and, for an unknown key, the nearest one there is.
func explain(err error) error {
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		var all []error
		for _, e := range strict.Errors {
			line, _ := e.Position()
			key := strings.Join(e.Key(), ".")
			all = append(all, fmt.Errorf("line %d: unknown key %q; did you mean %q?", line, key, nearest(key, keys(reflect.TypeFor[Config](), ""))))
		}
		return errors.Join(all...)
	}
	var decode *toml.DecodeError
	if errors.As(err, &decode) {
		line, column := decode.Position()
		return fmt.Errorf("line %d, column %d: %w", line, column, err)
	}
	return err
}

// keys lists the dotted names of all keys of a configuration struct.
func keys(t reflect.Type, prefix string) []string {
	var all []string
	for i := range t.NumField() {
		f := t.Field(i)
		name := prefix + f.Tag.Get("toml")
		all = append(all, name)
		if f.Type.Kind() == reflect.Struct {
			all = append(all, keys(f.Type, name+".")...)
		}
	}
	return all
}

// nearest returns the candidate with the smallest edit distance to key; the last part of a dotted
// name counts as well, so that a key in the wrong table is found.
func nearest(key string, candidates []string) string {
	last := key[strings.LastIndex(key, ".")+1:]
	distance := func(c string) int {
		return min(editDistance(key, c), 1+editDistance(last, c[strings.LastIndex(c, ".")+1:]))
	}
	return slices.MinFunc(candidates, func(a, b string) int { return distance(a) - distance(b) })
}

func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}

// drivers are the values of the key driver.
var drivers = []string{"auto", "cloud-hypervisor", "qemu"}

// scopes are the values of the key vm.template.
var scopes = []string{"node", "namespace", "pod"}

// places are the values of the key vm.empty_dirs.
var places = []string{"guest", "node"}

// maxState is how long the state folder's name may be: a unix socket's name in a pod's folder
// below it must fit into 108 bytes.
const maxState = 60

// maxWarm bounds the key vm.warm: each takes memory, and the kubelet starts no more pods at once.
const maxWarm = 16

// minWatchdog bounds the key vm.watchdog: a node that is busy may let a guest wait.
const minWatchdog = 5 * time.Second

func (c *Config) validate() error {
	for _, p := range []struct{ key, value string }{
		{"listen", c.Listen}, {"root", c.Root}, {"state", c.State}, {"guest", c.Guest}, {"cni.conf_dir", c.CNI.ConfDir},
	} {
		if !filepath.IsAbs(p.value) {
			return fmt.Errorf("%s = %q: want an absolute path", p.key, p.value)
		}
	}
	if c.CNI.NetNSDir != "" && !filepath.IsAbs(c.CNI.NetNSDir) {
		return fmt.Errorf("cni.netns_dir = %q: want an absolute path, or none", c.CNI.NetNSDir)
	}
	if len(c.State) > maxState {
		return fmt.Errorf("state = %q: longer than %d bytes, and unix sockets below it would not fit; choose a shorter path", c.State, maxState)
	}
	for _, p := range []struct {
		key, value string
		values     []string
	}{
		{"driver", c.Driver, drivers}, {"vm.template", c.VM.Template, scopes}, {"vm.empty_dirs", c.VM.EmptyDirs, places},
	} {
		if !slices.Contains(p.values, p.value) {
			return fmt.Errorf("%s = %q: want one of %s", p.key, p.value, strings.Join(p.values, ", "))
		}
	}
	if c.VM.Warm < -1 || c.VM.Warm > maxWarm {
		return fmt.Errorf("vm.warm = %d: want -1 to %d", c.VM.Warm, maxWarm)
	}
	if c.VM.Warm > 0 && c.VM.Template != "node" {
		return fmt.Errorf("vm.warm = %d: only with vm.template = node; others don't know whose clone to keep ready", c.VM.Warm)
	}
	if c.VM.Watchdog != 0 && time.Duration(c.VM.Watchdog) < minWatchdog {
		return fmt.Errorf("vm.watchdog = %v: want at least %v, which a guest that lives may be silent for, or 0s", time.Duration(c.VM.Watchdog), minWatchdog)
	}
	if c.VM.CPUs < 1 || c.VM.MaxCPUs < 0 {
		return fmt.Errorf("vm.cpus = %d, vm.max_cpus = %d: want at least 1 and 0", c.VM.CPUs, c.VM.MaxCPUs)
	}
	if c.VM.Memory < 128<<20 {
		return fmt.Errorf("vm.memory = %d: want at least 128Mi, which the guest itself needs to start", c.VM.Memory)
	}
	if c.VM.Scratch < 64<<20 {
		return fmt.Errorf("vm.scratch = %d: want at least 64Mi", c.VM.Scratch)
	}
	return nil
}

// String is the effective configuration as TOML.
func (c Config) String() string {
	var b strings.Builder
	e := toml.NewEncoder(&b)
	e.SetIndentTables(false)
	if err := e.Encode(c); err != nil {
		return err.Error() // unreachable: all fields encode
	}
	return b.String()
}
