package server

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/caisson-vm/caisson/podvm"
)

// maxGrace bounds the grace period of StopContainer, so that its duration can't overflow.
const maxGrace = int64(1 << 31)

// CreateContainer makes a container, not yet running. A retry finds what its first call made.
func (s *runtimeService) CreateContainer(ctx context.Context, r *cri.CreateContainerRequest) (*cri.CreateContainerResponse, error) {
	p, err := s.pod(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	config, err := containerConfig(r.GetConfig(), s.o.Images.Image)
	if err != nil {
		return nil, err
	}
	rro := func(m podvm.Mount) bool { return m.RecursiveReadOnly }
	if slices.ContainsFunc(config.Mounts, rro) && !s.o.Features.RecursiveReadOnlyMounts {
		return nil, fmt.Errorf("%w: %w", crierrors.ErrRROUnsupported, errdefs.ErrNotImplemented)
	}
	c, err := p.Create(ctx, config)
	if err != nil {
		return nil, notItself(err)
	}
	return &cri.CreateContainerResponse{ContainerId: c.Status().ID}, nil
}

// StartContainer runs a created container.
func (s *runtimeService) StartContainer(ctx context.Context, r *cri.StartContainerRequest) (*cri.StartContainerResponse, error) {
	c, err := s.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	return &cri.StartContainerResponse{}, notItself(c.Start(ctx))
}

// notItself: when a pod or container was found, what is missing is something that it needs, such as
// its command, and the CRI's NotFound would say of the pod or container that it is gone.
func notItself(err error) error {
	if errdefs.IsNotFound(err) {
		return invalid("%v", err)
	}
	return err
}

// StopContainer stops a container, by force when the grace period is over. One that is gone is
// stopped.
func (s *runtimeService) StopContainer(ctx context.Context, r *cri.StopContainerRequest) (*cri.StopContainerResponse, error) {
	grace := time.Duration(min(max(r.GetTimeout(), 0), maxGrace)) * time.Second
	c, err := s.container(r.GetContainerId())
	if err == nil {
		err = c.Stop(ctx, grace)
	}
	return &cri.StopContainerResponse{}, ignoreNotFound(err)
}

// RemoveContainer removes a container, running or not. One that is gone is removed.
func (s *runtimeService) RemoveContainer(ctx context.Context, r *cri.RemoveContainerRequest) (*cri.RemoveContainerResponse, error) {
	c, err := s.container(r.GetContainerId())
	if err == nil {
		err = c.Remove(ctx)
	}
	return &cri.RemoveContainerResponse{}, ignoreNotFound(err)
}

// ListContainers lists the containers that match the filter.
func (s *runtimeService) ListContainers(_ context.Context, r *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	return &cri.ListContainersResponse{Containers: s.listContainers(r.GetFilter())}, nil
}

// StreamContainers is ListContainers in pieces.
func (s *runtimeService) StreamContainers(r *cri.StreamContainersRequest, out grpc.ServerStreamingServer[cri.StreamContainersResponse]) error {
	return inPieces(s.listContainers(r.GetFilter()), func(piece []*cri.Container) error {
		return out.Send(&cri.StreamContainersResponse{Containers: piece})
	})
}

// ContainerStatus returns a container's status.
func (s *runtimeService) ContainerStatus(_ context.Context, r *cri.ContainerStatusRequest) (*cri.ContainerStatusResponse, error) {
	c, err := s.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	status := c.Status()
	resp := &cri.ContainerStatusResponse{Status: criContainerStatus(status)}
	if r.GetVerbose() {
		resp.Info, err = encode(map[string]any{"info": map[string]any{
			"sandboxID": status.Pod,
			"pid":       status.PID, // in the guest
			"config":    status.Config,
			"phases":    phases(status.Phases),
		}})
	}
	return resp, err
}

// UpdateContainerResources changes those of a container's limits that are set.
func (s *runtimeService) UpdateContainerResources(ctx context.Context, r *cri.UpdateContainerResourcesRequest) (*cri.UpdateContainerResourcesResponse, error) {
	if r.GetLinux() == nil {
		return nil, invalid("the update has no Linux resources")
	}
	limits, err := resources(r.GetLinux())
	if err != nil {
		return nil, err
	}
	c, err := s.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	return &cri.UpdateContainerResourcesResponse{}, c.Update(ctx, limits)
}

// ReopenContainerLog makes the container's output go to a new file at its log path.
func (s *runtimeService) ReopenContainerLog(ctx context.Context, r *cri.ReopenContainerLogRequest) (*cri.ReopenContainerLogResponse, error) {
	c, err := s.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	return &cri.ReopenContainerLogResponse{}, c.ReopenLog(ctx)
}

func (s *runtimeService) container(id string) (Container, error) {
	if id == "" {
		return nil, invalid("the container's id is missing")
	}
	return s.o.Pods.Container(id)
}

func (s *runtimeService) listContainers(f *cri.ContainerFilter) []*cri.Container {
	pod := s.fullPodID(f.GetPodSandboxId())
	var all []*cri.Container
	for _, c := range s.containersByID(f.GetId()) {
		item := criContainer(c.Status())
		if pod != "" && item.GetPodSandboxId() != pod {
			continue
		}
		if f.GetState() != nil && f.GetState().GetState() != item.GetState() {
			continue
		}
		if matches(f.GetLabelSelector(), item.GetLabels()) {
			all = append(all, item)
		}
	}
	return all
}

func (s *runtimeService) containersByID(id string) []Container {
	if id == "" {
		return s.o.Pods.Containers()
	}
	c, err := s.o.Pods.Container(id)
	if err != nil {
		return nil
	}
	return []Container{c}
}

// fullPodID completes a prefix; what fits no pod stays as it is.
func (s *runtimeService) fullPodID(id string) string {
	if id == "" {
		return ""
	}
	if p, err := s.o.Pods.Pod(id); err == nil {
		return p.Status().ID
	}
	return id
}

// containersOf are the statuses of a pod's containers, the oldest first.
func (s *runtimeService) containersOf(pod string) []*cri.ContainerStatus {
	all := []*cri.ContainerStatus{}
	for _, c := range s.o.Pods.Containers() {
		if status := c.Status(); status.Pod == pod {
			all = append(all, criContainerStatus(status))
		}
	}
	slices.SortFunc(all, func(a, b *cri.ContainerStatus) int { return int(a.GetCreatedAt() - b.GetCreatedAt()) })
	return all
}
