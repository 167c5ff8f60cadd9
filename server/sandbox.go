package server

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/podvm"
)

// RunPodSandbox starts a pod. A retry for a pod that is being started joins it, and one for a pod
// that runs returns its id.
func (s *runtimeService) RunPodSandbox(ctx context.Context, r *cri.RunPodSandboxRequest) (*cri.RunPodSandboxResponse, error) {
	c, err := podConfig(r.GetConfig(), r.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	if c.Security.UserNamespace && !s.o.Features.UserNamespaces {
		return nil, unimplemented("user namespaces", "pods have a kernel of their own; set hostUsers: true")
	}
	p, err := s.o.Pods.Run(ctx, c)
	if err != nil {
		return nil, err
	}
	return &cri.RunPodSandboxResponse{PodSandboxId: p.Status().ID}, nil
}

// StopPodSandbox stops a pod and its containers. A pod that is gone is stopped.
func (s *runtimeService) StopPodSandbox(ctx context.Context, r *cri.StopPodSandboxRequest) (*cri.StopPodSandboxResponse, error) {
	p, err := s.pod(r.GetPodSandboxId())
	if err == nil {
		err = p.Stop(ctx)
	}
	return &cri.StopPodSandboxResponse{}, ignoreNotFound(err)
}

// RemovePodSandbox removes a pod with all it has. A pod that is gone is removed.
func (s *runtimeService) RemovePodSandbox(ctx context.Context, r *cri.RemovePodSandboxRequest) (*cri.RemovePodSandboxResponse, error) {
	p, err := s.pod(r.GetPodSandboxId())
	if err == nil {
		err = p.Remove(ctx)
	}
	return &cri.RemovePodSandboxResponse{}, ignoreNotFound(err)
}

// PodSandboxStatus returns a pod's status, and those of its containers.
func (s *runtimeService) PodSandboxStatus(_ context.Context, r *cri.PodSandboxStatusRequest) (*cri.PodSandboxStatusResponse, error) {
	// The time comes first: what happens while the answer is made belongs to the next one.
	now := time.Now().UnixNano()
	p, err := s.pod(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	status := p.Status()
	resp := &cri.PodSandboxStatusResponse{
		Status:             criPodStatus(status),
		ContainersStatuses: s.containersOf(status.ID),
		Timestamp:          now,
	}
	if r.GetVerbose() {
		resp.Info, err = podInfo(status)
	}
	return resp, err
}

// ListPodSandbox lists the pods that match the filter.
func (s *runtimeService) ListPodSandbox(_ context.Context, r *cri.ListPodSandboxRequest) (*cri.ListPodSandboxResponse, error) {
	return &cri.ListPodSandboxResponse{Items: s.listPods(r.GetFilter())}, nil
}

// StreamPodSandboxes is ListPodSandbox in pieces.
func (s *runtimeService) StreamPodSandboxes(r *cri.StreamPodSandboxesRequest, out grpc.ServerStreamingServer[cri.StreamPodSandboxesResponse]) error {
	return inPieces(s.listPods(r.GetFilter()), func(piece []*cri.PodSandbox) error {
		return out.Send(&cri.StreamPodSandboxesResponse{PodSandboxes: piece})
	})
}

// UpdatePodSandboxResources resizes a pod's VM. The kubelet takes an error as a veto.
func (s *runtimeService) UpdatePodSandboxResources(ctx context.Context, r *cri.UpdatePodSandboxResourcesRequest) (*cri.UpdatePodSandboxResourcesResponse, error) {
	overhead, err := podResources(r.GetOverhead())
	if err != nil {
		return nil, fmt.Errorf("pod overhead: %w", err)
	}
	resources, err := podResources(r.GetResources())
	if err != nil {
		return nil, fmt.Errorf("pod resources: %w", err)
	}
	p, err := s.pod(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	return &cri.UpdatePodSandboxResourcesResponse{}, p.Update(ctx, overhead, resources)
}

func (s *runtimeService) pod(id string) (Pod, error) {
	if id == "" {
		return nil, invalid("the pod's id is missing")
	}
	return s.o.Pods.Pod(id)
}

func (s *runtimeService) listPods(f *cri.PodSandboxFilter) []*cri.PodSandbox {
	var all []*cri.PodSandbox
	for _, p := range s.podsByID(f.GetId()) {
		c := criPod(p.Status())
		if f.GetState() != nil && f.GetState().GetState() != c.GetState() {
			continue
		}
		if matches(f.GetLabelSelector(), c.GetLabels()) {
			all = append(all, c)
		}
	}
	return all
}

// podsByID is one pod, or none, or for no id all of them.
func (s *runtimeService) podsByID(id string) []Pod {
	if id == "" {
		return s.o.Pods.Pods()
	}
	p, err := s.o.Pods.Pod(id)
	if err != nil {
		return nil
	}
	return []Pod{p}
}

// matches tells whether the labels have all that the selector wants.
func matches(selector, labels map[string]string) bool {
	for k, want := range selector {
		if have, ok := labels[k]; !ok || have != want {
			return false
		}
	}
	return true
}

// piece is how many items go into one message of a stream. An item is far below 1 KiB but for its
// annotations, of which the API server allows 256 KiB: 32 of the largest fit into a message.
const piece = 32

func inPieces[T any](all []T, send func([]T) error) error {
	for len(all) > 0 {
		n := min(piece, len(all))
		if err := send(all[:n]); err != nil {
			return err
		}
		all = all[n:]
	}
	return nil
}

// ignoreNotFound: what is gone need not be stopped or removed.
func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// podInfo is the verbose part of a pod's status.
func podInfo(s podvm.PodStatus) (map[string]string, error) {
	return encode(map[string]any{
		"info": map[string]any{
			"pid":     s.VMM.PID,
			"driver":  s.Driver,
			"kernel":  s.Kernel,
			"guest":   s.Guest,
			"agent":   s.Agent,
			"netns":   s.NetNS,
			"cgroup":  s.Cgroup,
			"cpus":    s.VMM.Size.CPUs,
			"memory":  s.VMM.Size.Memory,
			"reason":  s.Reason,
			"message": s.Message,
			"config":  s.Config,
			"phases":  phases(s.Phases),
		},
	})
}

// phase is one of a pod's or a container's start.
type phase struct {
	Name  string  `json:"name"`
	Start float64 `json:"start_ms"`
	Took  float64 `json:"ms"`
}

func phases(all []podvm.Phase) []phase {
	out := []phase{}
	for _, p := range all {
		out = append(out, phase{p.Name, ms(p.Start), ms(p.Took)})
	}
	return out
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// encode makes an info map: values in JSON.
func encode(info map[string]any) (map[string]string, error) {
	out := map[string]string{}
	for k, v := range info {
		data, err := json.Marshal(v)
		if err != nil {
			return nil, fmt.Errorf("info %s: %w", k, err)
		}
		out[k] = strings.ToValidUTF8(string(data), "\uFFFD") // as protobuf wants it: raw JSON may be anything else
	}
	return out, nil
}
