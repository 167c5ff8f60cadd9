package network

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sync/errgroup"
)

// GC removes every network of this daemon that belongs to none of pods, and has the plugins of a
// CNI 1.1 configuration drop what belongs to no pod. Pods that were set up by this process stay,
// whether listed or not. It does what it can and returns all errors.
//
// The plugins' own collection knows nothing of other runtimes: a configuration that several share
// must say "disableGC": true.
// Source: CNI specification 1.1, GC.
func (n *CNI) GC(ctx context.Context, pods []string) error {
	known, err := n.known()
	if err != nil {
		return err
	}
	keep := n.keep(pods)
	var (
		mu   sync.Mutex
		errs []error
		g    errgroup.Group
	)
	g.SetLimit(8)
	for _, id := range known {
		if keep[id] {
			continue
		}
		g.Go(func() error {
			if err := n.Teardown(ctx, Pod{ID: id}); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, fmt.Errorf("network of pod %s: %w", id, err))
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return errors.Join(append(errs, n.collect(ctx, pods))...)
}

// collect runs the plugins' GC, where the configuration is of a version that has it. While pods
// are being added or deleted it is errdefs.ErrUnavailable rather than wait and hold up new ones.
func (n *CNI) collect(ctx context.Context, pods []string) error {
	list, err := n.config()
	if err != nil {
		return nil // without a configuration there is nothing to collect, and Status tells of it
	}
	if has, err := version.GreaterThanOrEqualTo(list.CNIVersion, "1.1.0"); err != nil || !has {
		return err
	}
	if !n.gate.TryLock() {
		return fmt.Errorf("cni gc of network %q: pods are being set up or torn down, try later: %w", list.Name, errdefs.ErrUnavailable)
	}
	defer n.gate.Unlock()
	var args libcni.GCArgs
	for id := range n.keep(pods) {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: id, IfName: ifName})
	}
	if err := n.lib.GCNetworkList(ctx, list, &args); err != nil {
		return fmt.Errorf("cni gc of network %q: %w", list.Name, err)
	}
	return nil
}

// keep is the set of pods that GC must not touch.
func (n *CNI) keep(pods []string) map[string]bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	keep := make(map[string]bool, len(pods)+len(n.states))
	for _, id := range pods {
		keep[id] = true
	}
	for id := range n.states {
		keep[id] = true
	}
	return keep
}
