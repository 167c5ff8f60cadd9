package podvm

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// follow begins to follow the pod's VM and what its agent reports. listed is called whenever the
// agent has told the state of every container, with those that nobody here knows.
func (p *Pod) follow(listed func(unknown []string)) {
	v, before := p.machine(), p.oomKills()
	if limit := p.m.o.Watchdog; limit > 0 {
		p.client.Guard(limit, func() { p.hung(limit) })
	}
	p.tasks.start(func(ctx context.Context) { p.watchAgent(ctx, listed) })
	p.tasks.start(func(ctx context.Context) {
		select {
		case <-v.Done():
			p.machineEnded(v, before)
		case <-ctx.Done():
		}
	})
}

// machineEnded handles a VM that ended although nobody asked it to. oomKills is how many processes of the pod
// the node had ended before for want of memory.
func (p *Pod) machineEnded(v vmm.VM, oomKills int) {
	message := "the VM has ended"
	if err := v.Info().Err; err != nil {
		message = printable(err.Error())
	}
	reason := "VMGone"
	if p.oomKills() > oomKills {
		reason, message = oomReason, "the node had no memory for the VM, in the pod's cgroup or at all: "+message
	}
	p.collapse(reason, message)
}

// oomReason is that of containers, and VMs, which were ended for want of memory.
const oomReason = "OOMKilled"

// hung handles a VM whose guest does not answer any more.
func (p *Pod) hung(limit time.Duration) {
	p.collapse("Unreachable", fmt.Sprintf("the guest has answered nothing for %v (vm.watchdog)", limit))
}

// collapse makes a ready pod one that is not, for a reason that nobody asked for, and ends what is in
// it.
func (p *Pod) collapse(reason, message string) {
	if !p.fall(reason, message) {
		return
	}
	p.bury()
	p.m.events.send(Event{Kind: EventStopped, Pod: p.Status()})
}

// lastWords is how long, after the end of a VM, what was received of its output may take to get into
// the logs.
const lastWords = 300 * time.Millisecond

// bury ends what is in a pod that fell. Nobody can tell what runs in a guest that does not answer, so that
// its VM is gone before its containers are told to have ended.
func (p *Pod) bury() {
	ctx, cancel := context.WithTimeout(context.Background(), eraseLimit)
	defer cancel()
	if err := p.endVM(ctx); err != nil { // they may run on: it is for Stop to try again
		slog.Error("end the VM of a pod that fell", "pod", p.id, "err", err)
		return
	}
	if p.machine() != nil { // its output was followed
		p.awaitLogs()
	}
	r := p.record.now()
	p.endContainers(r.Reason, r.Message)
	p.letGo()
}

// awaitLogs waits for the last words.
func (p *Pod) awaitLogs() {
	limit := time.After(lastWords)
	for _, c := range p.Containers() {
		select {
		case <-c.logged:
		case <-limit:
			return
		}
	}
}

// fall makes a ready pod one that is not, for a reason that nobody asked for. It returns false where
// the pod is being stopped.
func (p *Pod) fall(reason, message string) bool {
	p.mu.Lock()
	leaving := p.leaving
	p.mu.Unlock()
	if leaving {
		return false
	}
	changed, err := p.record.update(func(r *podRecord) bool {
		if r.Stage != ready {
			return false
		}
		r.Stage, r.Reason, r.Message = stopped, reason, message
		return true
	})
	p.note("record that a pod fell", err)
	if changed {
		slog.Error("pod fell", "pod", p.id, "reason", reason, "message", message)
		if o := p.m.o.Observer; o != nil {
			o.ObserveLoss(reason)
		}
	}
	return changed
}

// endContainers marks containers as ended with the VM.
func (p *Pod) endContainers(reason, message string) {
	for _, c := range p.Containers() {
		c.endedWithVM(reason, message)
	}
}

// How long after a broken stream the agent is asked again: at first, which it is anew after a stream that
// lasted, and at last.
const (
	rewatch     = 100 * time.Millisecond
	rewatchLast = 10 * time.Second
)

// watchAgent follows the states of containers until ctx ends.
func (p *Pod) watchAgent(ctx context.Context, listed func(unknown []string)) {
	for wait := rewatch; ; wait = min(2*wait, rewatchLast) {
		began := time.Now()
		err := p.watchOnce(ctx, listed)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > rewatchLast {
			wait = rewatch
		}
		slog.Warn("watch containers", "pod", p.id, "err", err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// watchOnce follows one stream to its end.
func (p *Pod) watchOnce(ctx context.Context, listed func(unknown []string)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	rpc, err := p.client.RPC(ctx)
	if err != nil {
		return err
	}
	awaited := p.Containers() // what is created from now on need not be in the listing
	stream, err := rpc.Watch(ctx, &agent.WatchRequest{})
	if err != nil {
		return err
	}
	listing := map[string]bool{} // nil once it is complete
	for {
		s, err := stream.Recv()
		if err != nil {
			return err
		}
		if s.Synced {
			if listing != nil {
				listed(p.compare(awaited, listing))
			}
			listing = nil
			continue
		}
		if listing != nil {
			if len(listing) == listingMax {
				return fmt.Errorf("the agent lists more than %d containers", listingMax)
			}
			if !isID(s.Id) {
				return fmt.Errorf("the agent lists a container %q, which is no id", printable(s.Id[:min(len(s.Id), 80)]))
			}
			listing[s.Id] = true
		}
		if c := p.container(s.Id); c != nil {
			c.reported(s)
		}
	}
}

// listingMax bounds what is remembered of an agent's listing.
const listingMax = 1 << 14

func (p *Pod) container(id string) *Container {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.containers[id]
}

// compare ends the containers of which the agent, asked for all, knows nothing, and returns those
// that only the agent knows.
func (p *Pod) compare(awaited []*Container, listing map[string]bool) (unknown []string) {
	for _, c := range awaited {
		if !listing[c.id] {
			c.ended(time.Now(), vmGoneCode, "Unknown", "the guest does not know the container any more")
		}
	}
	for id := range listing {
		if p.container(id) == nil {
			unknown = append(unknown, id)
		}
	}
	return unknown
}

// reported takes what the agent says of a container. The guest may say anything at any time: an exit
// counts once, and a start only when nobody here waits for one.
func (c *Container) reported(s *agent.ContainerState) {
	state := c.record.now().State
	switch {
	case state == Exited:
	case s.State == agent.State_STATE_EXITED:
		if c.exiting.CompareAndSwap(false, true) {
			c.pod.tasks.start(func(ctx context.Context) { c.exit(ctx, s) })
		}
	case s.State == agent.State_STATE_RUNNING && state == Created && c.starting.tryLock():
		defer c.starting.unlock()
		c.begun(guestTime(s.StartedNs, c.created), 0)
	}
}

// drainLimit is how long the log of an ended container may take to be written before its end shows.
const drainLimit = 5 * time.Second

// drain waits until what a container said is in its log, for as long as it may take.
func (c *Container) drain(ctx context.Context) {
	select {
	case <-c.logged:
	case <-time.After(drainLimit):
		slog.Warn("container log is not complete", "container", c.id)
	case <-ctx.Done():
	}
}

// exit makes a container's end visible, after what belongs to it is on the host: its files, its log.
func (c *Container) exit(ctx context.Context, s *agent.ContainerState) {
	if err := c.starting.lock(ctx); err != nil {
		return
	}
	defer c.starting.unlock()
	if err := writeBackAll(c.record.now().WriteBack, s.Files); err != nil {
		slog.Warn("write back files of a container", "container", c.id, "err", err)
	}
	c.drain(ctx)
	if ctx.Err() != nil {
		return // the next daemon is told of it, too
	}
	reason := "Error"
	switch {
	case s.OomKilled:
		reason = oomReason
	case s.ExitCode == 0:
		reason = "Completed"
	}
	if s.StartedNs != 0 && c.record.now().State == Created { // its start succeeded, and nobody heard of it
		c.begun(guestTime(s.StartedNs, c.created), 0)
	}
	c.ended(guestTime(s.FinishedNs, c.created), s.ExitCode&0xff, reason, "")
}

// guestTime is a time of the guest's clock, if it can be true.
func guestTime(ns int64, after time.Time) time.Time {
	now := time.Now()
	t := time.Unix(0, ns)
	if t.Before(after) || t.After(now) {
		return now
	}
	return t
}

// ended records the end of a container and tells it. Only the first end counts.
func (c *Container) ended(at time.Time, code int32, reason, message string) {
	changed, err := c.record.update(func(r *containerRecord) bool {
		if r.State == Exited {
			return false
		}
		r.State, r.Finished, r.ExitCode, r.Reason, r.Message = Exited, at, code, reason, cmp.Or(message, r.Message)
		return true
	})
	c.pod.note("record the end of a container", err)
	if !changed {
		return
	}
	c.pod.rank()
	close(c.exited)
	slog.Info("container exited", "pod", c.pod.id, "container", c.id, "code", code, "reason", reason)
	c.pod.m.events.send(Event{Kind: EventStopped, Pod: c.pod.Status(), Container: c.Status()})
}

// vmGoneCode is the exit code of a container whose VM ended: nobody knows another.
const vmGoneCode = 255

// killedCode is that of a process that SIGKILL has ended.
const killedCode = 128 + int32(unix.SIGKILL)

// endedWithVM ends a container whose VM is gone.
func (c *Container) endedWithVM(reason, message string) {
	if reason == stopReason { // the kubelet asked for it: the usual end of a container
		c.ended(time.Now(), killedCode, "Error", "")
		return
	}
	code := int32(vmGoneCode)
	if reason == oomReason {
		code = killedCode
	}
	c.ended(time.Now(), code, reason, message)
}
