package podvm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// boot has a VM run in the pod's cgroup, with the pod's identity, and gives it its size.
func (b *birth) boot(ctx context.Context) error {
	if b.warm {
		if err := b.takeOver(ctx); err != nil {
			if err = b.putBack(ctx, err); err != nil {
				return err
			}
		}
	}
	if b.warm {
		close(b.launched)
	} else if err := b.bring(ctx); err != nil {
		return err
	}
	return b.time("size", func() error { return b.fit(ctx, b.record.now().Config, nil) })
}

// bring starts a VM and makes it the pod's.
func (b *birth) bring(ctx context.Context) error {
	if err := b.launch(ctx); err != nil {
		return err
	}
	close(b.launched)
	return b.setUp(ctx)
}

// takeOver makes a warm VM, which may have died or hang meanwhile, the pod's.
func (b *birth) takeOver(ctx context.Context) error {
	if err := b.time("vm", func() error { return b.enter(ctx) }); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, b.m.patience)
	defer cancel()
	return b.setUp(ctx)
}

// putBack takes back a warm VM that is of no use, so that the pod starts as if there had been none.
func (b *birth) putBack(ctx context.Context, cause error) error {
	if ctx.Err() != nil { // it is the start that is given up
		return cause
	}
	cause = b.explain(cause)
	slog.Warn("a warm clone is taken back, and the pod gets another VM", "pod", b.id, "err", cause)
	b.client.Close() // an error is that of a stream which is of no use any more
	if err := b.time("undo", func() error { return b.retract(ctx) }); err != nil {
		return errors.Join(cause, err)
	}
	b.client = agent.NewClient(b.Pod)
	fresh := b.m.vmConfig(b.id)
	fresh.Tap, fresh.Cgroup = b.config.Tap, b.config.Cgroup
	b.config, b.warm = fresh, false
	return nil
}

func (b *birth) setUp(ctx context.Context) error {
	return b.time("setup", func() error {
		rpc, err := b.client.RPC(ctx)
		if err != nil {
			return err
		}
		return b.identify(ctx, rpc)
	})
}

// enter moves a warm VM into the pod's cgroup. What it has used so far counts where it was used.
func (b *birth) enter(ctx context.Context) error {
	if b.config.Cgroup == "" {
		return nil
	}
	pid := strconv.Itoa(b.machine().Info().PID)
	if err := os.WriteFile(filepath.Join(b.config.Cgroup, "cgroup.procs"), []byte(pid), 0); err != nil {
		return fmt.Errorf("move the VM into the pod's cgroup: %w", err)
	}
	b.delegate(ctx)
	return nil
}

// delegate tells systemd of the VM's cgroup.
func (b *birth) delegate(ctx context.Context) {
	if err := delegate(ctx, b.config.Cgroup, b.machine().Info().PID); err != nil {
		slog.Warn("systemd does not know of the pod's cgroup, and may take controllers from it", "pod", b.id, "err", err)
	}
}

// launch starts the VM as a clone of a template, or cold where there is none. What went wrong with
// the clone is logged and counted, because cold starts are slow.
func (b *birth) launch(ctx context.Context) error {
	r, o := b.record.now(), b.m.o
	driver := o.Drivers[r.Driver]
	if driver == nil {
		return fmt.Errorf("driver %s: %w", r.Driver, errdefs.ErrNotFound)
	}
	if o.Templates != nil && driver == o.Driver && b.m.clonable(r.Config) {
		err := b.clone(ctx, driver)
		if err == nil || ctx.Err() != nil {
			return err
		}
		slog.Warn("pod is booted cold: no clone of a template", "pod", b.id, "err", err)
		if o.Observer != nil {
			o.Observer.ObserveFallback()
		}
	}
	if err := b.time("scratch", func() error { return o.Scratch.Create(b.config.Disk.Path) }); err != nil {
		return err
	}
	if err := b.time("vm", func() error { return b.start(ctx, driver, b.config) }); err != nil {
		return err
	}
	return b.greet(ctx)
}

// greet waits until the guest's agent answers.
func (b *birth) greet(ctx context.Context) error {
	return b.time("guest", func() error {
		_, err := b.client.RPC(ctx)
		return err
	})
}

// answerLimit is how long the guest of a clone, which need not boot, may take to answer.
const answerLimit = 30 * time.Second

// clone starts the VM as a clone, and waits until its guest answers. On error nothing is there of it.
func (b *birth) clone(ctx context.Context, driver vmm.Driver) error {
	o := b.m.o
	scope := ""
	if o.Scope == "namespace" {
		scope = b.record.now().Config.Namespace
	}
	c := b.config
	c.Max = o.MaxClone
	err := b.time("template", func() (err error) {
		c.Template, err = o.Templates.Template(ctx, scope)
		return err
	})
	if err != nil {
		return err
	}
	err = b.time("scratch", func() error { return copyDisk(o.Templates.Disk(c.Template), c.Disk.Path) })
	cold := b.config
	if err == nil {
		err = b.time("vm", func() error { return b.start(ctx, driver, c) })
	}
	if err == nil {
		soon, cancel := context.WithTimeout(ctx, b.m.patience)
		err = b.greet(soon)
		cancel()
	}
	if err == nil {
		o.Templates.Worked(c.Template)
		b.m.pool.want() // the template may be new, and is to be taught then
		return nil
	}
	err = b.explain(err)
	if ctx.Err() == nil && !errdefs.IsResourceExhausted(err) { // else it is not the template's fault
		o.Templates.Failed(c.Template)
	}
	b.config = cold
	return errors.Join(err, b.time("undo", func() error { return b.retract(ctx) }))
}

// retract takes back a VM that was launched, or may have been, so that another one can be.
func (b *birth) retract(ctx context.Context) error {
	ctx, cancel := operation(ctx, eraseLimit)
	defer cancel()
	if err := b.endVM(ctx); err != nil {
		return fmt.Errorf("kill the clone: %w", err)
	}
	b.setMachine(nil)
	run := b.m.layout.run(b.id)
	if err := errors.Join(remove(b.config.Disk.Path), os.RemoveAll(run), os.Mkdir(run, 0o700)); err != nil {
		return err
	}
	return makeCgroup(b.config.Cgroup)
}

// start launches the VM and notes by which configuration it is attached to.
func (b *birth) start(ctx context.Context, driver vmm.Driver, c vmm.Config) error {
	v, err := driver.Launch(ctx, c)
	if err != nil {
		return err
	}
	b.config = c
	b.setMachine(v)
	b.delegate(ctx)
	return nil
}
