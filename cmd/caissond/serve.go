package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/caisson-vm/caisson/imagestore"
	"github.com/caisson-vm/caisson/metrics"
	"github.com/caisson-vm/caisson/network"
	"github.com/caisson-vm/caisson/podvm"
	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/share"
	"github.com/caisson-vm/caisson/podvm/state"
	"github.com/caisson-vm/caisson/podvm/template"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/server"
)

// serve runs the daemon until it is asked to end. Pods run on.
func serve(ctx context.Context, args []string) error {
	c, err := configFlag("serve", args)
	if err != nil {
		return err
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: c.Log.Level})))
	klog.SetSlogLogger(slog.Default()) // what the streaming libraries say
	release, err := lockFolders(c)
	if err != nil {
		return err
	}
	defer release()
	d, err := newDaemon(ctx, c)
	if err != nil {
		return err
	}
	defer d.close()
	return d.run(ctx)
}

// lockFolders keeps other daemons from the folders in which this one removes what it does not know.
func lockFolders(c Config) (release func(), err error) {
	root, err := state.Acquire(c.Root, "root")
	if err != nil {
		return nil, err
	}
	if filepath.Clean(c.State) == filepath.Clean(c.Root) {
		return func() { root.Release() }, nil
	}
	run, err := state.Acquire(c.State, "state")
	if err != nil {
		return nil, errors.Join(err, root.Release())
	}
	return func() { run.Release(); root.Release() }, nil
}

// node is the daemon's parts.
type node struct {
	config    Config
	images    *imagestore.Store
	pods      *podvm.Manager
	metrics   *metrics.Metrics
	cri       *server.Server
	templates *template.Store
	shares    *share.Server
}

func newDaemon(ctx context.Context, c Config) (*node, error) {
	g, err := guestimage.Keep(c.Guest, filepath.Join(c.Root, "guest-kept"))
	if err != nil {
		return nil, err
	}
	if err := sweepProbes(ctx, c.State); err != nil {
		return nil, err
	}
	found, err := chooseDriver(ctx, c, g, false)
	if err != nil {
		return nil, err
	}
	level := slog.LevelInfo
	if !found.driver.KVM() {
		level = slog.LevelWarn
	}
	slog.Log(ctx, level, "driver", "name", found.driver.Name(), "version", found.driver.Version(), "reason", found.reason, "guest", g.Version)
	d := &node{
		config: c, metrics: metrics.New(version, found.driver.Name(), accelerator(found.driver), g.Version),
		shares: share.New("/proc/self/exe", shareCommand),
	}
	d.images, err = imagestore.Open(imagestore.Options{
		Root: filepath.Join(c.Root, "images"), Puller: []string{"/proc/self/exe", pullCommand}, Pinned: c.Images.Pinned,
		RegistriesConf: c.Images.RegistriesConf, Policy: c.Images.Policy, Pulled: d.metrics.ObservePull,
	})
	if err != nil {
		return nil, err
	}
	cni := network.New(networkOptions(c))
	if err := d.makePods(c, g, found, cni); err != nil {
		d.images.Close()
		return nil, err
	}
	d.cri, err = server.New(ctx, server.Options{
		Pods: server.Manage(d.pods), Images: d.images, Runtime: runtimeReady(c, g, found.driver), Network: cni.Status, Root: filepath.Join(c.Root, "pods"), Version: version,
		Info: map[string]any{"config": c, "driver": found.driver.Name(), "driverVersion": found.driver.Version(), "driverReason": found.reason, "guest": g},
		// A mount of a guest has none below it that is not the mount's own.
		Features: server.Features{RecursiveReadOnlyMounts: true},
		Observer: d.metrics,
	})
	if err != nil {
		d.images.Close()
		return nil, errors.Join(err, d.pods.Close())
	}
	d.metrics.Collect(d.sources())
	return d, nil
}

func networkOptions(c Config) network.Options {
	o := network.Options{
		ConfDir: c.CNI.ConfDir, BinDirs: c.CNI.BinDirs, CacheDir: filepath.Join(c.Root, "cni"), NetNSDir: c.CNI.NetNSDir,
		AllowFilters: c.CNI.AllowFilters,
	}
	if o.NetNSDir == "" {
		o.NetNSDir = filepath.Join(c.State, "netns")
	}
	return o
}

// makePods makes the templates and the manager of pods.
func (d *node) makePods(c Config, g guestimage.Files, found choice, cni *network.CNI) (err error) {
	size, most, clone := c.sizes(vmm.Size{CPUs: runtime.NumCPU(), Memory: nodeMemory()}, found.driver)
	scratch, err := podvm.NewScratch(c.Root, int64(c.VM.Scratch))
	if err != nil {
		return err
	}
	o := podvm.Options{
		Root: c.Root, State: c.State, Driver: found.driver, Drivers: found.all, Guest: g, Network: cni, Images: d.images,
		Scope: c.VM.Template, Size: size, Max: most, MaxClone: clone, Scratch: scratch, DAX: c.VM.DAX, NodeEmptyDirs: c.VM.EmptyDirs == "node", Warm: c.warm(found.driver.Name()), Observer: d.metrics,
		Shares: d.shares, Watchdog: time.Duration(c.VM.Watchdog),
	}
	d.templates, err = template.New(template.Options{ // also without a use for it: it removes what there was
		Dir: filepath.Join(c.Root, "templates"), Run: c.State, Driver: found.driver,
		Depends: []string{found.driver.Version(), g.Version, hostKernel(), fmt.Sprint("scratch ", int64(c.VM.Scratch))},
		Config: vmm.Config{
			Kernel: g.Kernel, Initrd: g.Initrd, Cmdline: g.Cmdline, Size: size, Max: clone, Disk: podvm.ScratchDisk(),
		},
		Wants: func(scope string) bool {
			return c.VM.Template == "node" && scope == "" || c.VM.Template == "namespace" && scope != ""
		},
		MakeDisk: scratch.Create, OpenTap: network.LooseTap, Prepare: podvm.Prepare,
	})
	if err != nil {
		return err
	}
	if c.VM.Template != "pod" {
		o.Templates = d.templates
	}
	d.pods, err = podvm.New(o)
	return err
}

// sizes are what a VM starts with, and what it and a clone can grow to, on a node of this size.
func (c Config) sizes(node vmm.Size, driver program) (size, most, clone vmm.Size) {
	size = vmm.Size{CPUs: c.VM.CPUs, Memory: int64(c.VM.Memory)}
	most = vmm.Size{CPUs: c.VM.MaxCPUs, Memory: int64(c.VM.MaxMemory)}
	if most.CPUs == 0 {
		most.CPUs = node.CPUs
	}
	if most.Memory == 0 {
		most.Memory = node.Memory
	}
	most.CPUs, most.Memory = max(most.CPUs, size.CPUs), max(most.Memory, size.Memory)
	if limit := driver.MaxCPUs(); most.CPUs > limit {
		slog.Info("pods get no more vCPUs than the driver's VMs can have", "driver", driver.Name(), "most_cpus", limit, "instead_of", most.CPUs)
		size.CPUs, most.CPUs = min(size.CPUs, limit), limit
	}
	clone = most
	if c.VM.MaxClone > 0 {
		clone.Memory = max(min(most.Memory, int64(c.VM.MaxClone)), size.Memory)
	}
	return size, most, clone
}

func (d *node) sources() metrics.Sources {
	return metrics.Sources{
		Pods: func() (all []podvm.PodStatus) {
			for _, p := range d.pods.Pods() {
				all = append(all, p.Status())
			}
			return all
		},
		Containers: func() (all []podvm.ContainerStatus) {
			for _, c := range d.pods.Containers() {
				all = append(all, c.Status())
			}
			return all
		},
		Images: func() (int, uint64, error) {
			u, err := d.images.Usage()
			return len(d.images.Images()), u.Bytes, err
		},
		Templates: d.templates.Usage,
		Starting:  d.pods.Starting,
		Warm:      d.pods.WarmClones,
	}
}

// run recovers the pods, then listens.
func (d *node) run(ctx context.Context) error {
	if d.config.VM.Template == "node" {
		go d.templates.Template(ctx, "") // made before the first pod asks, if it can be
	}
	if err := d.pods.Recover(ctx); err != nil {
		return err
	}
	failed := make(chan error, 2)
	if err := d.serveMetrics(failed); err != nil {
		return err
	}
	l, err := server.Listen(ctx, d.config.Listen)
	if err != nil {
		return err
	}
	go func() { failed <- d.cri.Serve(l) }()
	d.pods.Warm()
	d.pods.KeepClocks()
	d.templates.Sweep(d.pods.Cloned)
	slog.Info("serving the CRI", "listen", d.config.Listen, "version", version)
	daemon.SdNotify(false, daemon.SdNotifyReady) // an error says that nobody waits for it
	select {
	case <-ctx.Done():
		daemon.SdNotify(false, daemon.SdNotifyStopping)
		d.leave()
		return nil
	case err := <-failed:
		return err
	}
}

// shutdownGrace is what containers have to end in where the machine goes down, as in pods by default. What the
// unit has to stop in (TimeoutStopSec) is more.
const shutdownGrace = 30 * time.Second

// leave ends the daemon's part: pods run on, for the next one. Where the machine goes down, their containers are
// asked to stop first, while nobody can start them again.
func (d *node) leave() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*shutdownGrace)
	defer cancel()
	if !podvm.GoingDown(ctx) {
		slog.Info("ending; pods run on")
		return
	}
	slog.Info("the machine goes down: containers are asked to stop", "grace", shutdownGrace)
	if err := d.cri.Close(); err != nil {
		slog.Error("end", "err", err)
	}
	d.pods.StopContainers(ctx, shutdownGrace)
}

func (d *node) serveMetrics(failed chan<- error) error {
	if d.config.Metrics.Listen == "" {
		return nil
	}
	l, err := net.Listen("tcp", d.config.Metrics.Listen)
	if err != nil {
		return fmt.Errorf("metrics.listen: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", d.metrics.Handler())
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	slog.Info("serving metrics", "listen", l.Addr().String())
	go func() { failed <- s.Serve(l) }()
	return nil
}

func (d *node) close() {
	if err := errors.Join(d.cri.Close(), d.pods.Close()); err != nil {
		slog.Error("end", "err", err)
	}
	d.shares.Close()
	d.templates.Close()
	d.images.Close()
}

// nodeMemory is the machine's, in bytes.
func nodeMemory() int64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 0
	}
	return int64(info.Totalram) * int64(info.Unit)
}

// hostKernel is the release of the node's kernel, whose KVM a template's state comes from.
func hostKernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}
