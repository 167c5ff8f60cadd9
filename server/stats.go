package server

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/podvm"
)

// A list of stats asks this many guests at once, and none for longer than the limit: one that
// hangs must not hide the others.
const (
	statsAtOnce = 16
	statsLimit  = 5 * time.Second
)

// sample is what a running pod answered.
type sample struct {
	status podvm.PodStatus
	stats  podvm.PodStats
	// at is when the answer came, by the host's clock: a guest's may say anything.
	at time.Time
	// containers are the statuses of the pod's containers by id.
	containers map[string]podvm.ContainerStatus
}

// ContainerStats returns what a container uses.
func (s *runtimeService) ContainerStats(ctx context.Context, r *cri.ContainerStatsRequest) (*cri.ContainerStatsResponse, error) {
	c, err := s.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	status := c.Status()
	p, err := s.pod(status.Pod)
	if err != nil {
		return nil, err
	}
	one, err := s.ask(ctx, p)
	if err != nil {
		return nil, err
	}
	for _, cs := range one.stats.Containers {
		if cs.ID == status.ID {
			return &cri.ContainerStatsResponse{Stats: s.criContainerStats(one, cs)}, nil
		}
	}
	return nil, fmt.Errorf("container %s is %s and has no stats: %w", status.ID, status.State, errdefs.ErrFailedPrecondition)
}

// ListContainerStats returns what the containers that match the filter use.
func (s *runtimeService) ListContainerStats(ctx context.Context, r *cri.ListContainerStatsRequest) (*cri.ListContainerStatsResponse, error) {
	return &cri.ListContainerStatsResponse{Stats: s.listContainerStats(ctx, r.GetFilter())}, nil
}

// StreamContainerStats is ListContainerStats in pieces.
func (s *runtimeService) StreamContainerStats(r *cri.StreamContainerStatsRequest, out grpc.ServerStreamingServer[cri.StreamContainerStatsResponse]) error {
	return inPieces(s.listContainerStats(out.Context(), r.GetFilter()), func(piece []*cri.ContainerStats) error {
		return out.Send(&cri.StreamContainerStatsResponse{ContainerStats: piece})
	})
}

// PodSandboxStats returns what a pod and its containers use.
func (s *runtimeService) PodSandboxStats(ctx context.Context, r *cri.PodSandboxStatsRequest) (*cri.PodSandboxStatsResponse, error) {
	p, err := s.pod(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	one, err := s.ask(ctx, p)
	if err != nil {
		return nil, err
	}
	return &cri.PodSandboxStatsResponse{Stats: s.criPodStats(one)}, nil
}

// ListPodSandboxStats returns what the pods that match the filter use.
func (s *runtimeService) ListPodSandboxStats(ctx context.Context, r *cri.ListPodSandboxStatsRequest) (*cri.ListPodSandboxStatsResponse, error) {
	return &cri.ListPodSandboxStatsResponse{Stats: s.listPodStats(ctx, r.GetFilter())}, nil
}

// StreamPodSandboxStats is ListPodSandboxStats in pieces.
func (s *runtimeService) StreamPodSandboxStats(r *cri.StreamPodSandboxStatsRequest, out grpc.ServerStreamingServer[cri.StreamPodSandboxStatsResponse]) error {
	return inPieces(s.listPodStats(out.Context(), r.GetFilter()), func(piece []*cri.PodSandboxStats) error {
		return out.Send(&cri.StreamPodSandboxStatsResponse{PodSandboxStats: piece})
	})
}

func (s *runtimeService) listContainerStats(ctx context.Context, f *cri.ContainerStatsFilter) []*cri.ContainerStats {
	only, pod := "", s.fullPodID(f.GetPodSandboxId())
	if f.GetId() != "" {
		c, err := s.o.Pods.Container(f.GetId())
		if err != nil {
			return nil
		}
		status := c.Status()
		if pod != "" && pod != status.Pod {
			return nil
		}
		only, pod = status.ID, status.Pod
	}
	var all []*cri.ContainerStats
	for _, one := range s.askAll(ctx, s.podsByID(pod)) {
		for _, cs := range one.stats.Containers {
			status, known := one.containers[cs.ID]
			if known && (only == "" || only == cs.ID) && matches(f.GetLabelSelector(), status.Config.Labels) {
				all = append(all, s.criContainerStats(one, cs))
			}
		}
	}
	return all
}

func (s *runtimeService) listPodStats(ctx context.Context, f *cri.PodSandboxStatsFilter) []*cri.PodSandboxStats {
	var wanted []Pod
	for _, p := range s.podsByID(f.GetId()) {
		if matches(f.GetLabelSelector(), p.Status().Config.Labels) {
			wanted = append(wanted, p)
		}
	}
	var all []*cri.PodSandboxStats
	for _, one := range s.askAll(ctx, wanted) {
		all = append(all, s.criPodStats(one))
	}
	return all
}

// ask asks a pod's guest.
func (s *runtimeService) ask(ctx context.Context, p Pod) (*sample, error) {
	status := p.Status()
	if status.State != podvm.Ready {
		return nil, fmt.Errorf("pod %s is %s and has no stats: %w", status.ID, status.State, errdefs.ErrFailedPrecondition)
	}
	stats, err := p.Stats(ctx)
	if err != nil {
		return nil, fmt.Errorf("stats of pod %s: %w", status.ID, err)
	}
	one := &sample{status: status, stats: stats, at: time.Now(), containers: map[string]podvm.ContainerStatus{}}
	for _, c := range s.o.Pods.Containers() {
		if cs := c.Status(); cs.Pod == status.ID {
			one.containers[cs.ID] = cs
		}
	}
	return one, nil
}

// askAll asks the guests of all running pods. Those that give no answer are left out.
func (s *runtimeService) askAll(ctx context.Context, pods []Pod) []*sample {
	answers := make([]*sample, len(pods))
	var wg sync.WaitGroup
	slots := make(chan struct{}, statsAtOnce)
	for i, p := range pods {
		if p.Status().State != podvm.Ready {
			continue
		}
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(ctx, statsLimit)
			defer cancel()
			one, err := s.ask(ctx, p)
			if err != nil {
				// A pod that stops meanwhile is no news, a guest that is silent may be.
				s.o.Log.Debug("no stats", "pod", p.Status().ID, "err", err)
				return
			}
			answers[i] = one
		})
	}
	wg.Wait()
	s.rates.prune(time.Now())
	return slices.DeleteFunc(answers, func(one *sample) bool { return one == nil })
}
