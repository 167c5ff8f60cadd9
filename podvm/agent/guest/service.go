package guest

import (
	"context"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"golang.org/x/sys/unix"
)

// service is the agent as ttrpc knows it.
type service struct{ a *Agent }

func (s service) Prepare(ctx context.Context, req *agent.PrepareRequest) (*agent.Empty, error) {
	return &agent.Empty{}, s.a.doPrepare(ctx, req)
}

func (s service) Rehearse(ctx context.Context, req *agent.RehearseRequest) (*agent.Empty, error) {
	return &agent.Empty{}, s.a.rehearse(ctx, req)
}

func (s service) Setup(ctx context.Context, req *agent.SetupRequest) (*agent.SetupResponse, error) {
	return s.a.doSetup(ctx, req)
}

func (s service) Clock(_ context.Context, req *agent.ClockRequest) (*agent.ClockResponse, error) {
	if err := correct(time.Duration(req.AddNs)); err != nil {
		return nil, err
	}
	return &agent.ClockResponse{ClockNs: time.Now().UnixNano()}, nil
}

func (s service) Network(ctx context.Context, req *agent.NetworkRequest) (*agent.Empty, error) {
	return &agent.Empty{}, s.a.network(ctx, req)
}

func (s service) Create(ctx context.Context, req *agent.CreateRequest) (*agent.CreateResponse, error) {
	return s.a.create(ctx, req)
}

func (s service) Start(ctx context.Context, req *agent.StartRequest) (*agent.StartResponse, error) {
	c, err := s.a.container(req.Id)
	if err != nil {
		return nil, err
	}
	return c.start(ctx)
}

func (s service) Signal(_ context.Context, req *agent.SignalRequest) (*agent.Empty, error) {
	c, err := s.a.container(req.Id)
	if err != nil {
		return nil, err
	}
	return &agent.Empty{}, c.signal(unix.Signal(req.Signal), req.All)
}

func (s service) Update(ctx context.Context, req *agent.UpdateRequest) (*agent.Empty, error) {
	c, err := s.a.container(req.Id)
	if err != nil {
		return nil, err
	}
	return &agent.Empty{}, c.update(ctx, req.Resources)
}

func (s service) Remove(ctx context.Context, req *agent.RemoveRequest) (*agent.Empty, error) {
	return &agent.Empty{}, s.a.remove(ctx, req.Id)
}

func (s service) Files(ctx context.Context, req *agent.FilesRequest) (*agent.Empty, error) {
	_, err := s.a.files.put(ctx, req.GetFiles())
	return &agent.Empty{}, err
}

func (s service) Detach(ctx context.Context, req *agent.DetachRequest) (*agent.Empty, error) {
	return &agent.Empty{}, s.a.disks.detach(ctx, req.Addr)
}

func (s service) Stats(ctx context.Context, _ *agent.StatsRequest) (*agent.StatsResponse, error) {
	return s.a.stats(ctx)
}

func (s service) Watch(ctx context.Context, _ *agent.WatchRequest, w agent.Agent_WatchServer) error {
	return s.a.watch.follow(ctx, w.Send)
}
