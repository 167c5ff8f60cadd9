package server

import (
	"log/slog"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/podvm"
)

func textLog(l *logs) *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func TestEvents(t *testing.T) {
	d := start(t)
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)
	stream := must(c.GetContainerEvents(ctx, &cri.GetEventsRequest{}))(t)
	// The subscription is made when the first byte arrives; wait for it.
	for {
		d.pods.mu.Lock()
		n := len(d.pods.readers)
		d.pods.mu.Unlock()
		if n == 1 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	pod, container := d.running(t)
	for _, want := range []string{pod, container} {
		e := must(stream.Recv())(t)
		if e.GetContainerId() != want || e.GetContainerEventType() != cri.ContainerEventType_CONTAINER_CREATED_EVENT || e.GetCreatedAt() == 0 ||
			e.GetPodSandboxStatus().GetMetadata().GetUid() != "7d0c" {
			t.Errorf("event of %s: %v", want, e)
		}
		if want == container && len(e.GetContainersStatuses()) != 1 {
			t.Errorf("containers: %v", e.GetContainersStatuses())
		}
	}
	d.pods.mu.Lock()
	status := d.pods.pods[0].status
	for _, kind := range []podvm.EventKind{podvm.EventStarted, podvm.EventStopped, podvm.EventDeleted} {
		d.pods.send(podvm.Event{Kind: kind, Pod: status})
	}
	d.pods.mu.Unlock()
	for _, want := range []cri.ContainerEventType{
		cri.ContainerEventType_CONTAINER_STARTED_EVENT, cri.ContainerEventType_CONTAINER_STOPPED_EVENT, cri.ContainerEventType_CONTAINER_DELETED_EVENT,
	} {
		if e := must(stream.Recv())(t); e.GetContainerEventType() != want {
			t.Errorf("got %v; want %s", e, want)
		}
	}
	// A reader that was dropped must learn of it, or it would wait for ever.
	close(d.pods.readers[0])
	_, err := stream.Recv()
	wantCode(t, err, codes.Unavailable)
}
