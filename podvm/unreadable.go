package podvm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/state"
)

// unreadable is the reason of pods and containers whose record can't be read. Where it does not even say what
// they are, their name is unnamed: nobody can know them again, so that nothing of them may run on.
const (
	unreadable = "Unreadable"
	unnamed    = "unreadable"
)

// podIdentity is what the kubelet knows its pod again by, so that it stops it before it starts another one.
type podIdentity struct {
	ID      string
	Created time.Time
	Config  struct {
		Name, Namespace, UID string
		Attempt              uint32
		Labels, Annotations  map[string]string
		RuntimeHandler       string
	}
}

// readPodIdentity reads what can be read of a pod's record.
func (m *Manager) readPodIdentity(id string) (r podIdentity, named bool) {
	err := state.ReadPart(m.layout.record(id), &r)
	named = err == nil && r.ID == id && r.Config.Name != "" && r.Config.Namespace != "" && r.Config.UID != ""
	if !named {
		r = podIdentity{ID: id}
		r.Config.Name, r.Config.Namespace, r.Config.UID = unnamed, unnamed, id
	}
	if r.Created.IsZero() {
		r.Created = modified(m.layout.pod(id))
	}
	return r, named
}

// unreadable shows a pod whose record can't be understood. What the kubelet knows again is left to it; the VM
// of any other pod is ended. The rest of it stays until somebody asks for its removal. An error is not the pod's.
func (m *Manager) unreadable(ctx context.Context, id string, cause error) error {
	i, named := m.readPodIdentity(id)
	slog.Error("unreadable record is kept", "pod", id, "name", i.Config.Namespace+"/"+i.Config.Name, "err", cause)
	p := m.podOf(podRecord{
		ID: id, Created: i.Created, Stage: stopped, Reason: unreadable, Message: cause.Error(), Driver: m.o.Driver.Name(), VM: m.vmConfig(id),
		Config: PodConfig{
			Name: i.Config.Name, Namespace: i.Config.Namespace, UID: i.Config.UID, Attempt: i.Config.Attempt,
			Labels: i.Config.Labels, Annotations: i.Config.Annotations, RuntimeHandler: i.Config.RuntimeHandler,
		},
	})
	p.record.keep()
	m.register(p)
	if named {
		return nil
	}
	limited, cancel := context.WithTimeout(ctx, eraseLimit)
	defer cancel()
	err := p.endVM(limited)
	if err != nil && (ctx.Err() != nil || isNodes(err)) {
		return err
	}
	if err != nil {
		slog.Error("the VM of a pod with an unreadable record runs on: end it with 'crictl stopp'", "pod", id, "err", err)
	}
	return nil
}

// containerIdentity is podIdentity of a container, with what it takes to stop it and to go on with its log.
type containerIdentity struct {
	ID, Pod, ImageRef, StopSignal string
	Created, Started              time.Time
	Config                        struct {
		Name                string
		Attempt             uint32
		Image, ImageName    string
		Labels, Annotations map[string]string
		LogPath             string
	}
}

// addUnreadable shows a container whose record can't be understood. It may run, and can be stopped and removed.
func (p *Pod) addUnreadable(path string, cause error) {
	id := strings.TrimSuffix(filepath.Base(path), ".json")
	if !isID(id) {
		slog.Warn("not a container's record, left alone", "path", path)
		return
	}
	var i containerIdentity
	err := state.ReadPart(path, &i)
	if err != nil || i.ID != id || i.Pod != p.id || i.Config.Name == "" {
		i = containerIdentity{}
		i.Config.Name = unnamed
	}
	if i.Created.IsZero() {
		i.Created = modified(path)
	}
	slog.Error("unreadable record is kept", "pod", p.id, "container", id, "name", i.Config.Name, "err", cause)
	c := p.containerOf(containerRecord{
		ID: id, Pod: p.id, State: Unknown, Reason: unreadable, Message: cause.Error(),
		ImageRef: i.ImageRef, StopSignal: i.StopSignal, Created: i.Created, Started: i.Started,
		Config: ContainerConfig{
			Name: i.Config.Name, Attempt: i.Config.Attempt, Labels: i.Config.Labels, Annotations: i.Config.Annotations, LogPath: i.Config.LogPath,
			Image: cmp.Or(i.Config.Image, unnamed), ImageName: cmp.Or(i.Config.ImageName, unnamed), // the kubelet takes no status without
		},
	})
	c.record.keep()
	p.add(c)
}

// unnamed tells whether nobody can know what the container is, and it may run.
func (c *Container) unnamed() bool {
	r := c.record.now()
	return r.State == Unknown && r.Config.Name == unnamed
}

// endUnnamed ends the containers of which nobody knows what they are: the kubelet is about to start them anew.
func (p *Pod) endUnnamed(ctx context.Context) error {
	var errs []error
	for _, c := range p.Containers() {
		if !c.unnamed() {
			continue
		}
		if err := c.stop(ctx, 0); err != nil {
			errs = append(errs, fmt.Errorf("end a container with an unreadable record: %w", err))
		}
	}
	return errors.Join(errs...)
}

// noSecond refuses a container beside which an earlier one of its name, whose record can't be read, may run.
func (p *Pod) noSecond(ctx context.Context, name string) error {
	for _, c := range p.Containers() {
		if r := c.record.now(); r.State == Unknown && r.Config.Name == name && name != unnamed {
			return fmt.Errorf("container %s of that name may run, and its record can't be read: stop it first: %w", c.id, errdefs.ErrFailedPrecondition)
		}
	}
	return p.endUnnamed(ctx)
}

// modified is when a file or folder was last written to, or now.
func modified(path string) time.Time {
	if info, err := os.Stat(path); err == nil {
		return info.ModTime()
	}
	return time.Now()
}
