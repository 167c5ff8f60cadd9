package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"github.com/caisson-vm/caisson/internal/undo"
)

// Options say where the CNI's parts are. A zero field takes its default.
type Options struct {
	// ConfDir holds the network configurations, of which the first by name is used.
	// Default: /etc/cni/net.d.
	ConfDir string
	// BinDirs hold the plugins; the first that has one wins. Default: /opt/cni/bin, /usr/lib/cni.
	BinDirs []string
	// CacheDir holds the results of ADD and what a later DEL needs. It belongs to one daemon and
	// must outlive a reboot, as the plugins' own state does. Default: /var/lib/caisson/cni.
	CacheDir string
	// NetNSDir holds one bind-mounted network namespace per pod, named by its id. Default:
	// /run/caisson/netns; /run/netns would do, but ip-netns(8) mounts over that.
	NetNSDir string
	// Timeout is how long one run of a plugin may take before it is killed. Default: 1 minute.
	Timeout time.Duration
	// AllowFilters starts pods in whose namespaces plugins have put packet filters, which a VM's packets
	// never pass.
	AllowFilters bool
}

// CNI gives pods their network through CNI plugins. Its methods may be called concurrently, but
// for one pod only one at a time.
type CNI struct {
	o    Options
	lib  *libcni.CNIConfig
	kind atomic.Int32 // index in filters of the one this kernel took last
	// gate keeps the plugins' GC (writing) apart from ADD and DEL (reading), as the CNI demands.
	gate sync.RWMutex

	mu sync.Mutex
	// states are of the pods with a network of this process, which GC must not touch even when its
	// list of pods was taken before they came.
	states map[string]state
}

// state is how far a pod's network has come.
type state int

const (
	opened state = iota + 1
	set
)

// New returns a CNI. It touches nothing: Status says whether what Options name is there.
func New(o Options) *CNI {
	if o.ConfDir == "" {
		o.ConfDir = "/etc/cni/net.d"
	}
	if len(o.BinDirs) == 0 {
		o.BinDirs = []string{"/opt/cni/bin", "/usr/lib/cni"}
	}
	if o.CacheDir == "" {
		o.CacheDir = "/var/lib/caisson/cni"
	}
	if o.NetNSDir == "" {
		o.NetNSDir = "/run/caisson/netns"
	}
	if o.Timeout == 0 {
		o.Timeout = time.Minute
	}
	return &CNI{
		o:      o,
		lib:    newLib(o, nil),
		states: map[string]state{},
	}
}

// newLib returns a libcni whose plugins inherit hold, where there is one.
func newLib(o Options, hold *os.File) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(o.BinDirs, o.CacheDir, &runner{limit: o.Timeout, hold: hold})
}

// Open makes a pod's network namespace, and in it the tap of its first interface, whose descriptor it
// returns (see OpenTap): a VM can start while Setup does the rest, and before it is known for what
// pod. When Open fails it has taken everything back. A pod that has a network, or the remains of one,
// is errdefs.ErrAlreadyExists: Teardown comes first.
func (n *CNI) Open(id string) (tap *os.File, err error) {
	if err := validID(id); err != nil {
		return nil, err
	}
	if n.knows(id) {
		return nil, fmt.Errorf("pod %s has a network, tear it down first: %w", id, errdefs.ErrAlreadyExists)
	}
	n.setState(id, opened)
	var u undo.Stack
	defer u.Run()
	u.Push("tear down network of pod "+id, func(ctx context.Context) error {
		return n.Teardown(ctx, Pod{ID: id})
	})
	// The record comes before anything it takes to undo, so that there is no moment at which a
	// crash leaves what Teardown can't find.
	path := n.netnsPath(id)
	if err := n.writeRecord(&libcni.NetworkConfigList{}, &libcni.RuntimeConf{ContainerID: id, NetNS: path}); err != nil {
		return nil, err
	}
	err = createNetNS(path, func(h *netlink.Handle) (err error) {
		tap, err = createTap(h, tapName(0))
		return err
	})
	if err != nil {
		return nil, err
	}
	u.Release()
	return tap, nil
}

// Setup has the CNI's plugins fill the pod's network namespace, and joins a tap to each interface
// they made. It is called once after Open, or without it. When it fails it has taken everything back.
func (n *CNI) Setup(ctx context.Context, p Pod) (*Attachment, error) {
	if n.state(p.ID) != opened {
		tap, err := n.Open(p.ID)
		if err != nil {
			return nil, err
		}
		tap.Close()
	}
	n.setState(p.ID, set)
	var u undo.Stack
	defer u.Run()
	u.Push("tear down network of pod "+p.ID, func(ctx context.Context) error {
		return n.Teardown(ctx, Pod{ID: p.ID})
	})
	list, err := n.config()
	if err != nil {
		return nil, err
	}
	if err := n.installed(list); err != nil {
		return nil, err
	}
	rt, err := runtimeConf(p, n.netnsPath(p.ID))
	if err != nil {
		return nil, err
	}
	a, err := n.setup(ctx, list, rt)
	if err != nil {
		return nil, err
	}
	u.Release()
	return a, nil
}

func (n *CNI) setup(ctx context.Context, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) (*Attachment, error) {
	begin := time.Now()
	if err := n.writeRecord(list, rt); err != nil {
		return nil, err
	}
	result, err := n.add(ctx, list, rt)
	if err != nil {
		return nil, err
	}
	plugged := time.Now()
	a := &Attachment{NetNS: rt.NetNS, DNS: resultDNS(result)}
	if a.Interfaces, err = n.connect(rt, result); err != nil {
		return nil, err
	}
	if a.Sysctls, err = sysctls(list, rt.IfName); err != nil {
		return nil, err
	}
	slog.DebugContext(ctx, "network up", "pod", rt.ContainerID, "network", list.Name,
		"cni_ms", plugged.Sub(begin).Milliseconds(), "tap_ms", time.Since(plugged).Milliseconds())
	return a, nil
}

func (n *CNI) add(ctx context.Context, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) (*types100.Result, error) {
	lib, release, err := n.plugins(ctx, rt.ContainerID)
	if err != nil {
		return nil, err
	}
	defer release()
	n.gate.RLock()
	defer n.gate.RUnlock()
	added, err := lib.AddNetworkList(ctx, list, rt)
	if err != nil {
		return nil, fmt.Errorf("cni add to network %q: %w", list.Name, err)
	}
	result, err := types100.NewResultFromResult(added)
	if err != nil {
		return nil, fmt.Errorf("result of network %q: %w", list.Name, err)
	}
	return result, nil
}

// Teardown takes the pod's network away: CNI DEL with what ADD was given, then the namespace with
// its taps. Only p.ID is needed. It is idempotent, and a pod that never had a network is no error.
// Where a plugin fails, what a second attempt needs stays.
func (n *CNI) Teardown(ctx context.Context, p Pod) error {
	if err := validID(p.ID); err != nil {
		return err
	}
	defer n.setState(p.ID, 0)
	if !n.knows(p.ID) {
		return nil
	}
	if err := n.del(ctx, p); err != nil {
		return err
	}
	if err := deleteNetNS(n.netnsPath(p.ID)); err != nil {
		return err
	}
	if err := os.Remove(n.recordPath(p.ID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network record: %w", err)
	}
	return nil
}

func (n *CNI) del(ctx context.Context, p Pod) error {
	list, rt, err := n.attachment(p)
	if err != nil {
		return err
	}
	if list == nil {
		return nil
	}
	if !isNetNS(rt.NetNS) {
		rt.NetNS = "" // the CNI's word for a namespace that is gone, as after a reboot
	}
	lib, release, err := n.plugins(ctx, p.ID)
	if err != nil {
		return err
	}
	defer release()
	n.gate.RLock()
	defer n.gate.RUnlock()
	if err := lib.DelNetworkList(ctx, list, rt); err != nil {
		return fmt.Errorf("cni del from network %q (its addresses stay in use until a retry succeeds): %w", list.Name, err)
	}
	return nil
}

// Check has the plugins look whether the pod's network still is as ADD left it. A pod without a
// network, or whose namespace is gone, is errdefs.ErrNotFound.
// Source: CNI specification 1.0, CHECK.
func (n *CNI) Check(ctx context.Context, id string) error {
	if err := validID(id); err != nil {
		return err
	}
	if !n.knows(id) || !isNetNS(n.netnsPath(id)) {
		return fmt.Errorf("pod %s has no network namespace: %w", id, errdefs.ErrNotFound)
	}
	list, rt, err := n.attachment(Pod{ID: id})
	if err != nil {
		return err
	}
	if list == nil {
		return fmt.Errorf("pod %s has a network namespace but was never added to a network: %w", id, errdefs.ErrNotFound)
	}
	err = n.lib.CheckNetworkList(ctx, list, rt)
	if errors.Is(err, libcni.ErrorCheckNotSupp) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cni check of network %q: %w", list.Name, err)
	}
	return nil
}

func (n *CNI) state(id string) state {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.states[id]
}

func (n *CNI) setState(id string, s state) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if s == 0 {
		delete(n.states, id)
		return
	}
	n.states[id] = s
}

func (n *CNI) netnsPath(id string) string { return filepath.Join(n.o.NetNSDir, id) }

// idPattern is what the CNI takes for a container id; here it also is a file name.
var idPattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)

func validID(id string) error {
	if !idPattern.MatchString(id) {
		return fmt.Errorf("pod id %q is not 1 to 128 letters, digits, dots, dashes: %w", id, errdefs.ErrInvalidArgument)
	}
	return nil
}
