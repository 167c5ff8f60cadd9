package podvm

import (
	"context"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
)

func (a *fakeAgent) Prepare(context.Context, *agent.PrepareRequest) (*agent.Empty, error) {
	return &agent.Empty{}, a.call("Prepare")
}

func (a *fakeAgent) Rehearse(_ context.Context, req *agent.RehearseRequest) (*agent.Empty, error) {
	if req.Rootfs != nil {
		return &agent.Empty{}, a.call("Rehearse with an image")
	}
	return &agent.Empty{}, a.call("Rehearse")
}

func (a *fakeAgent) Setup(_ context.Context, r *agent.SetupRequest) (*agent.SetupResponse, error) {
	if err := a.call("Setup"); err != nil {
		return nil, err
	}
	a.do(func() { a.setup = r })
	return &agent.SetupResponse{Kernel: "6.1\x1b[31m", Agent: "test"}, nil
}

func (a *fakeAgent) Clock(_ context.Context, r *agent.ClockRequest) (*agent.ClockResponse, error) {
	if err := a.call("Clock"); err != nil {
		return nil, err
	}
	var now time.Time
	a.do(func() {
		a.behind -= time.Duration(r.AddNs)
		now = time.Now().Add(-a.behind)
	})
	return &agent.ClockResponse{ClockNs: now.UnixNano()}, nil
}

func (a *fakeAgent) Network(_ context.Context, r *agent.NetworkRequest) (*agent.Empty, error) {
	if err := a.call("Network"); err != nil {
		return nil, err
	}
	a.do(func() { a.network = r })
	return &agent.Empty{}, nil
}

func (a *fakeAgent) Create(_ context.Context, r *agent.CreateRequest) (*agent.CreateResponse, error) {
	if err := a.call("Create"); err != nil {
		return nil, err
	}
	a.do(func() {
		a.containers[r.Id] = &fakeContainer{request: r, state: &agent.ContainerState{Id: r.Id, State: agent.State_STATE_CREATED}}
	})
	return &agent.CreateResponse{Uid: 1, Gid: 2, Groups: []int64{3}}, nil
}

func (a *fakeAgent) Start(_ context.Context, r *agent.StartRequest) (*agent.StartResponse, error) {
	if err := a.call("Start"); err != nil {
		return nil, err
	}
	c, err := a.has(r.Id)
	if err != nil {
		return nil, err
	}
	now := time.Now().UnixNano()
	a.do(func() {
		c.state = &agent.ContainerState{Id: r.Id, State: agent.State_STATE_RUNNING, StartedNs: now}
	})
	return &agent.StartResponse{StartedNs: now, Pid: 7}, nil
}

// Signal ends the container at SIGTERM and SIGKILL.
func (a *fakeAgent) Signal(_ context.Context, r *agent.SignalRequest) (*agent.Empty, error) {
	if err := a.call("Signal"); err != nil {
		return nil, err
	}
	c, err := a.has(r.Id)
	if err != nil {
		return nil, err
	}
	a.do(func() { c.signals = append(c.signals, r.Signal) })
	if r.Signal == int32(unix.SIGTERM) || r.Signal == int32(unix.SIGKILL) {
		a.exit(r.Id, 128+r.Signal)
	}
	return &agent.Empty{}, nil
}

func (a *fakeAgent) Update(_ context.Context, r *agent.UpdateRequest) (*agent.Empty, error) {
	if err := a.call("Update"); err != nil {
		return nil, err
	}
	c, err := a.has(r.Id)
	if err != nil {
		return nil, err
	}
	a.do(func() { c.update = r.Resources })
	return &agent.Empty{}, nil
}

func (a *fakeAgent) Remove(_ context.Context, r *agent.RemoveRequest) (*agent.Empty, error) {
	if err := a.call("Remove"); err != nil {
		return nil, err
	}
	a.do(func() { delete(a.containers, r.Id) })
	return &agent.Empty{}, nil
}

func (a *fakeAgent) Files(_ context.Context, r *agent.FilesRequest) (*agent.Empty, error) {
	if err := a.call("Files"); err != nil {
		return nil, err
	}
	a.do(func() { a.files = append(a.files, r.Files) })
	return &agent.Empty{}, nil
}

func (a *fakeAgent) Detach(context.Context, *agent.DetachRequest) (*agent.Empty, error) {
	return &agent.Empty{}, a.call("Detach")
}

func (a *fakeAgent) Stats(context.Context, *agent.StatsRequest) (*agent.StatsResponse, error) {
	if err := a.call("Stats"); err != nil {
		return nil, err
	}
	return &agent.StatsResponse{Pod: &agent.Cgroup{MemoryUsage: 1, CpuPsi: &agent.PSI{}}, Containers: []*agent.ContainerStats{{Id: "x"}}}, nil
}

// Watch sends all states, and each one that changes.
func (a *fakeAgent) Watch(ctx context.Context, _ *agent.WatchRequest, w agent.Agent_WatchServer) error {
	if err := a.call("Watch"); err != nil {
		return err
	}
	sent, reports := map[string]*agent.ContainerState{}, 0
	for first := true; ; first = false {
		a.mu.Lock()
		var send []*agent.ContainerState
		for id, c := range a.containers {
			if sent[id] != c.state {
				send, sent[id] = append(send, c.state), c.state
			}
		}
		send = append(send, a.reports[reports:]...)
		reports = len(a.reports)
		changed := a.changed
		a.mu.Unlock()
		if first {
			send = append(send, &agent.ContainerState{Synced: true})
		}
		for _, s := range send {
			if err := w.Send(s); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
