package podvm

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// A guest counts time by itself: of what corrects the node's wall clock, or sets it, it has nothing.

const (
	// clockEvery is how often guests' clocks are compared with the node's: one that is 50 ppm off is 15 ms away then.
	clockEvery = 5 * time.Minute
	// clocksAtOnce are compared at a time, each within clockLimit.
	clocksAtOnce = 16
	clockLimit   = 5 * time.Second
	// clockTolerance is how far they may be away from what is known of the node's.
	clockTolerance = time.Millisecond
)

// KeepClocks begins to keep the wall clocks of pods that of the node, until Close.
func (m *Manager) KeepClocks() {
	m.clocks.start(func(ctx context.Context) {
		steps := clockSteps(ctx)
		tick := time.NewTicker(clockEvery)
		defer tick.Stop()
		for {
			m.setClocks(ctx)
			select {
			case <-tick.C:
			case <-steps:
			case <-ctx.Done():
				return
			}
		}
	})
}

// setClocks compares the clocks of all pods with the node's, and corrects them.
func (m *Manager) setClocks(ctx context.Context) {
	var group errgroup.Group
	group.SetLimit(clocksAtOnce)
	for _, p := range m.Pods() {
		group.Go(func() error {
			// A guest of before has no such call.
			if err := p.setClock(ctx); err != nil && !errdefs.IsNotImplemented(err) && p.running() && ctx.Err() == nil {
				slog.Warn("the clock of a pod can't be compared with the node's", "pod", p.id, "err", err)
			}
			return nil
		})
	}
	group.Wait()
}

// setClock corrects the guest's clock by what it is away from the node's, as far as that can be told: the answer
// is of some moment of the call.
func (p *Pod) setClock(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, clockLimit)
	defer cancel()
	rpc, err := p.rpc(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	r, err := rpc.Clock(ctx, &agent.ClockRequest{})
	if err != nil {
		return err
	}
	half := time.Since(began) / 2
	behind := time.Duration(began.Add(half).UnixNano() - r.ClockNs)
	if behind.Abs() <= half+clockTolerance {
		return nil
	}
	if _, err := rpc.Clock(ctx, &agent.ClockRequest{AddNs: int64(behind)}); err != nil {
		return err
	}
	if behind.Abs() >= agent.ClockStep {
		slog.Info("the clock of a pod was set", "pod", p.id, "behind", behind)
	}
	return nil
}

// clockSteps tells each time that the node's clock was set, until ctx ends.
// Source: timerfd_create(2), TFD_TIMER_CANCEL_ON_SET.
func clockSteps(ctx context.Context) <-chan struct{} {
	steps := make(chan struct{}, 1)
	fd, err := unix.TimerfdCreate(unix.CLOCK_REALTIME, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		slog.Error("it will not be seen at once when the node's clock is set", "err", err)
		return steps
	}
	timer := os.NewFile(uintptr(fd), "timerfd")
	context.AfterFunc(ctx, func() { timer.Close() })
	go func() {
		for {
			err := awaitStep(timer)
			if !errors.Is(err, unix.ECANCELED) {
				if ctx.Err() == nil {
					slog.Error("it is no longer seen at once when the node's clock is set", "err", err)
				}
				return
			}
			select {
			case steps <- struct{}{}:
			default:
			}
		}
	}()
	return steps
}

// awaitStep waits until the clock is set, which is ECANCELED.
func awaitStep(timer *os.File) error {
	raw, err := timer.SyscallConn()
	if err != nil {
		return err
	}
	never := unix.ItimerSpec{Value: unix.Timespec{Sec: math.MaxInt64 / int64(time.Second)}}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.TimerfdSettime(int(fd), unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET, &never, nil)
	})
	if err = errors.Join(err, set); err != nil {
		return err
	}
	_, err = timer.Read(make([]byte, 8))
	return err
}
