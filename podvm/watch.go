package podvm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// follow begins to follow the pod's VM and what its agent reports.
func (p *Pod) follow() {
	ctx, cancel := context.WithCancel(context.Background())
	p.mu.Lock()
	p.end = cancel
	v := p.vm
	p.mu.Unlock()
	go p.watchAgent(ctx)
	go func() {
		select {
		case <-v.Done():
			p.machineEnded(ctx)
		case <-ctx.Done():
		}
	}()
}

// machineEnded handles a VM that ended although nobody asked it to.
func (p *Pod) machineEnded(ctx context.Context) {
	message := "the VM has ended"
	if err := p.machine().Info().Err; err != nil {
		message = printable(err.Error())
	}
	p.mu.Lock()
	if p.record.Stage != ready {
		p.mu.Unlock()
		return // it is being stopped
	}
	p.record.Stage, p.record.Reason, p.record.Message = stopped, "VMGone", message
	err := p.saveLocked()
	p.mu.Unlock()
	slog.Error("pod lost its VM", "pod", p.id, "reason", message)
	if err != nil {
		slog.Error("record the end of a pod", "pod", p.id, "err", err)
	}
	p.endContainers("VMGone", message)
	p.detach()
	p.m.events.send(Event{Kind: EventStopped, Pod: p.Status()})
}

// endContainers marks containers as ended with the VM.
func (p *Pod) endContainers(reason, message string) {
	for _, c := range p.Containers() {
		c.endedWithVM(reason, message)
	}
}

// rewatch is how long after a broken stream the agent is asked again.
const rewatch = 500 * time.Millisecond

// watchAgent follows the states of containers until ctx ends.
func (p *Pod) watchAgent(ctx context.Context) {
	for ctx.Err() == nil {
		if err := p.watchOnce(ctx, nil); err != nil && ctx.Err() == nil {
			slog.Warn("watch containers", "pod", p.id, "err", err)
		}
		select {
		case <-time.After(rewatch):
		case <-ctx.Done():
		}
	}
}

// watchOnce follows one stream; synced, if not nil, is called after the first listing.
func (p *Pod) watchOnce(ctx context.Context, synced func()) error {
	rpc, err := p.client.RPC(ctx)
	if err != nil {
		return err
	}
	stream, err := rpc.Watch(ctx, &agent.WatchRequest{})
	if err != nil {
		return err
	}
	for {
		s, err := stream.Recv()
		if err != nil {
			return err
		}
		if s.Synced {
			if synced != nil {
				synced()
			}
			continue
		}
		p.mu.Lock()
		c := p.containers[s.Id]
		p.mu.Unlock()
		if c != nil {
			c.reported(s)
		}
	}
}

// reported takes what the agent says of a container. The guest may say anything at any time: only
// an exit counts, once, and only of a container that may have been running.
func (c *Container) reported(s *agent.ContainerState) {
	if s.State != agent.State_STATE_EXITED {
		return
	}
	c.mu.Lock()
	over := c.record.State == Exited || c.exiting
	c.exiting = true
	c.mu.Unlock()
	if over {
		return
	}
	go c.exit(s)
}

// drainLimit is how long the log of an ended container may take to be written before its end shows.
// A process that it left behind can hold its output open.
const drainLimit = 5 * time.Second

// exit makes a container's end visible, after what belongs to it is on the host: its files, its log.
func (c *Container) exit(s *agent.ContainerState) {
	for _, f := range s.Files {
		if err := c.writeBack(f); err != nil {
			slog.Warn("write back a file of a container", "container", c.id, "err", err)
		}
	}
	select {
	case <-c.logged:
	case <-time.After(drainLimit):
	}
	reason := "Error"
	switch {
	case s.OomKilled:
		reason = "OOMKilled"
	case s.ExitCode == 0:
		reason = "Completed"
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
	c.mu.Lock()
	if c.record.State == Exited {
		c.mu.Unlock()
		return
	}
	r := &c.record
	r.State, r.Finished, r.ExitCode, r.Reason, r.Message = Exited, at, code, reason, message
	err := c.saveLocked()
	close(c.exited)
	c.mu.Unlock()
	if err != nil {
		slog.Error("record the end of a container", "container", c.id, "err", err)
	}
	slog.Info("container exited", "pod", c.pod.id, "container", c.id, "code", code, "reason", reason)
	c.pod.m.events.send(Event{Kind: EventStopped, Pod: c.pod.Status(), Container: c.Status()})
}

// vmGoneCode is the exit code of a container whose VM ended: nobody knows another.
const vmGoneCode = 255

// endedWithVM ends a container whose VM is gone. One that was never started has not run.
func (c *Container) endedWithVM(reason, message string) {
	if reason == "Stopped" { // the kubelet asked for it: the usual end of a container
		c.ended(time.Now(), 128+int32(unix.SIGKILL), "Error", "")
		return
	}
	c.ended(time.Now(), vmGoneCode, reason, message)
}

// writeBackMax bounds what is written back of a file, in bytes.
const writeBackMax = 1 << 20

// writeBack puts what a container wrote into its copy of a file into the host's: only into files
// that were given to it for writing, in place, because the kubelet has them mounted elsewhere too.
func (c *Container) writeBack(f *agent.WrittenFile) error {
	path, ok := c.record.WriteBack[f.Name]
	if !ok || len(f.Content) > writeBackMax {
		return fmt.Errorf("%q, %d bytes: not a file that it may write", printable(f.Name), len(f.Content))
	}
	file, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file any more", path)
	}
	_, err = file.WriteAt(f.Content, 0)
	return errors.Join(err, file.Truncate(int64(len(f.Content))))
}
