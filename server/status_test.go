package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestWithCode(t *testing.T) {
	wrap := func(kind error) error { return fmt.Errorf("pod abc: %w", fmt.Errorf("start: %w", kind)) }
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{errors.New("plain"), codes.Unknown},
		{wrap(errdefs.ErrInvalidArgument), codes.InvalidArgument},
		{wrap(errdefs.ErrNotFound), codes.NotFound},
		{wrap(errdefs.ErrAlreadyExists), codes.AlreadyExists},
		{wrap(errdefs.ErrFailedPrecondition), codes.FailedPrecondition},
		{wrap(errdefs.ErrOutOfRange), codes.OutOfRange},
		{wrap(errdefs.ErrResourceExhausted), codes.ResourceExhausted},
		{wrap(errdefs.ErrNotImplemented), codes.Unimplemented},
		{wrap(errdefs.ErrUnavailable), codes.Unavailable},
		{wrap(errdefs.ErrPermissionDenied), codes.PermissionDenied},
		{wrap(errdefs.ErrUnauthenticated), codes.Unauthenticated},
		{wrap(errdefs.ErrInternal), codes.Internal},
		{wrap(errdefs.ErrAborted), codes.Aborted},
		{wrap(context.DeadlineExceeded), codes.DeadlineExceeded},
		{wrap(context.Canceled), codes.Canceled},
		{status.Error(codes.DataLoss, "x"), codes.DataLoss},
		{wrap(status.Error(codes.NotFound, "x")), codes.NotFound},
	} {
		got := withCode(tc.err)
		if status.Code(got) != tc.want {
			t.Errorf("%v: %v; want %s", tc.err, got, tc.want)
		}
		if tc.err != nil && status.Code(tc.err) == codes.Unknown && status.Convert(got).Message() != tc.err.Error() {
			t.Errorf("the text changed from %q to %q", tc.err, got)
		}
	}
}

func TestLevels(t *testing.T) {
	for _, tc := range []struct {
		method string
		code   codes.Code
		took   time.Duration
		want   slog.Level
	}{
		{"RunPodSandbox", codes.OK, time.Second, slog.LevelInfo},
		{"RunPodSandbox", codes.OK, time.Minute, slog.LevelWarn},
		{"RunPodSandbox", codes.Unavailable, 0, slog.LevelWarn},
		{"RunPodSandbox", codes.Unknown, 0, slog.LevelError},
		{"PullImage", codes.OK, time.Minute, slog.LevelInfo},
		{"ListPodSandbox", codes.OK, 0, slog.LevelDebug},
		{"StreamContainers", codes.OK, 0, slog.LevelDebug},
		{"ContainerStatus", codes.OK, 0, slog.LevelDebug},
		{"ContainerStatus", codes.NotFound, 0, slog.LevelDebug},
		{"GetContainerEvents", codes.Canceled, time.Hour, slog.LevelDebug},
		{"PullImage", codes.NotFound, 0, slog.LevelWarn},
		{"Status", codes.OK, 0, slog.LevelDebug},
		{"ImageFsInfo", codes.OK, 0, slog.LevelDebug},
		{"RuntimeConfig", codes.OK, 0, slog.LevelDebug},
		{"UpdateRuntimeConfig", codes.OK, 0, slog.LevelInfo},
		{"UpdateContainerResources", codes.OK, 0, slog.LevelInfo},
		{"ExecSync", codes.OK, time.Minute, slog.LevelDebug},
		{"ExecSync", codes.DeadlineExceeded, 0, slog.LevelInfo},
		{"StopContainer", codes.DeadlineExceeded, 0, slog.LevelWarn},
		{"Exec", codes.OK, 0, slog.LevelInfo},
		{"RemoveImage", codes.OK, 0, slog.LevelInfo},
	} {
		if got := levelOf(tc.method, tc.code, tc.took); got != tc.want {
			t.Errorf("%s %s after %s: %s; want %s", tc.method, tc.code, tc.took, got, tc.want)
		}
	}
}

type observed struct {
	mu    sync.Mutex
	calls []string
}

func (o *observed) ObserveCall(method, code string, took time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.calls = append(o.calls, method+" "+code)
	if took <= 0 {
		o.calls = append(o.calls, "took no time")
	}
}

func TestInterceptor(t *testing.T) {
	seen := &observed{}
	d := start(t, func(o *Options) { o.Observer = seen })
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)
	pod, _ := d.running(t)
	d.pods.pods[0].status.Config.Labels = nil
	_, err := c.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: "feed"})
	wantCode(t, err, codes.NotFound)
	stream := must(c.StreamPodSandboxes(ctx, &cri.StreamPodSandboxesRequest{}))(t)
	for {
		if _, err := stream.Recv(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	seen.mu.Lock()
	defer seen.mu.Unlock()
	if got := strings.Join(seen.calls, ", "); got != "RunPodSandbox OK, CreateContainer OK, StartContainer OK, PodSandboxStatus NotFound, StreamPodSandboxes OK" {
		t.Errorf("observed: %s", got)
	}
	for _, want := range []string{
		"level=INFO msg=RunPodSandbox pod=" + pod + " name=shop/web-0 ms=",
		"level=DEBUG msg=PodSandboxStatus pod=feed ms=0 code=NotFound err=\"pod feed: not found\"",
	} {
		if !strings.Contains(d.log.String(), want) {
			t.Errorf("%q is not in the log:\n%s", want, d.log)
		}
	}
	if n := strings.Count(d.log.String(), "\n"); n != 5 {
		t.Errorf("%d lines for 5 calls:\n%s", n, d.log)
	}
}

// TestPanic: a bug in one call costs that call, not the pods' daemon.
func TestPanic(t *testing.T) {
	var log logs
	i := interceptor{log: slog.New(slog.NewTextHandler(&log, nil))}
	_, err := i.unary(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: "/runtime.v1.RuntimeService/Status"},
		func(context.Context, any) (any, error) { panic("boom") })
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "boom") {
		t.Error(err)
	}
	err = i.stream(nil, serverStream{ctx: t.Context()}, &grpc.StreamServerInfo{FullMethod: "/runtime.v1.RuntimeService/GetContainerEvents"},
		func(any, grpc.ServerStream) error { panic("bang") })
	wantCode(t, err, codes.Internal)
	for _, want := range []string{"panic=boom", "panic=bang", "status_test.go"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("%q is not in the log", want)
		}
	}
}

type serverStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s serverStream) Context() context.Context { return s.ctx }

// TestLogKeepsSecrets: credentials reach the store and no log.
func TestLogKeepsSecrets(t *testing.T) {
	d := start(t)
	images := cri.NewImageServiceClient(d.conn)
	_, err := images.PullImage(t.Context(), &cri.PullImageRequest{
		Image: &cri.ImageSpec{Image: "nope"}, Auth: &cri.AuthConfig{Username: "u", Password: "hunter2"},
	})
	wantCode(t, err, codes.NotFound)
	if d.images.auth.Password != "hunter2" || strings.Contains(d.log.String(), "hunter2") || !strings.Contains(d.log.String(), "image=nope") {
		t.Errorf("auth %+v, log:\n%s", d.images.auth, d.log)
	}
}
