package server

import (
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/podvm"
)

var eventTypes = map[podvm.EventKind]cri.ContainerEventType{
	podvm.EventCreated: cri.ContainerEventType_CONTAINER_CREATED_EVENT,
	podvm.EventStarted: cri.ContainerEventType_CONTAINER_STARTED_EVENT,
	podvm.EventStopped: cri.ContainerEventType_CONTAINER_STOPPED_EVENT,
	podvm.EventDeleted: cri.ContainerEventType_CONTAINER_DELETED_EVENT,
}

// GetContainerEvents sends what happens to pods and containers, with the whole status of the pod,
// so that the kubelet need not ask for it. A reader that falls behind is told so and starts over.
func (s *runtimeService) GetContainerEvents(_ *cri.GetEventsRequest, out grpc.ServerStreamingServer[cri.ContainerEventResponse]) error {
	ctx := out.Context()
	for e := range s.o.Pods.Events(ctx) {
		if err := out.Send(s.criEvent(e)); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("the reader of events fell behind, list and start over: %w", errdefs.ErrUnavailable)
}

// criEvent: an event of the pod itself bears the pod's id in the place of a container's.
func (s *runtimeService) criEvent(e podvm.Event) *cri.ContainerEventResponse {
	id := e.Container.ID
	if id == "" {
		id = e.Pod.ID
	}
	at := e.Time
	if at.IsZero() {
		at = time.Now()
	}
	return &cri.ContainerEventResponse{
		ContainerId:        id,
		ContainerEventType: eventTypes[e.Kind],
		CreatedAt:          nano(at),
		PodSandboxStatus:   criPodStatus(e.Pod),
		ContainersStatuses: s.containersOf(e.Pod.ID),
	}
}
