package server

import (
	"context"
	"fmt"
	"log/slog"
	"path"
	"runtime/debug"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Observer is told of every call when it ends: the CRI's name for it ("RunPodSandbox"), the name
// of the gRPC code ("OK", "NotFound") and how long it took. Both names are from fixed sets.
type Observer interface {
	ObserveCall(method, code string, took time.Duration)
}

// slow is from when on a call is worth a warning. Pulls, commands and grace periods take the time
// that they take.
const slow = 10 * time.Second

var patient = map[string]bool{"PullImage": true, "ExecSync": true, "StopContainer": true, "StopPodSandbox": true, "GetContainerEvents": true}

// interceptor is the one place where errors become gRPC codes, panics become errors, and calls are
// logged and measured.
type interceptor struct {
	log      *slog.Logger
	observer Observer // may be nil
}

func (i interceptor) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	began := time.Now()
	defer func() {
		if p := recover(); p != nil {
			resp, err = nil, i.panicked(info.FullMethod, p)
		}
		err = i.done(ctx, info.FullMethod, req, resp, err, time.Since(began))
	}()
	return next(ctx, req)
}

func (i interceptor) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	began := time.Now()
	defer func() {
		if p := recover(); p != nil {
			err = i.panicked(info.FullMethod, p)
		}
		err = i.done(ss.Context(), info.FullMethod, nil, nil, err, time.Since(began))
	}()
	return next(srv, ss)
}

func (i interceptor) panicked(method string, p any) error {
	i.log.Error("panic", "method", path.Base(method), "panic", p, "stack", string(debug.Stack()))
	return status.Error(codes.Internal, "caissond met an error of its own; its log has the stack")
}

// done gives the error its code, and the call its line in the log.
func (i interceptor) done(ctx context.Context, fullMethod string, req, resp any, err error, took time.Duration) error {
	method := path.Base(fullMethod)
	err = withCode(err)
	code := status.Code(err)
	if i.observer != nil {
		i.observer.ObserveCall(method, code.String(), took)
	}
	level := levelOf(method, code, took)
	if !i.log.Enabled(ctx, level) {
		return err
	}
	args := append(subject(req, resp), "ms", took.Milliseconds())
	if err != nil {
		args = append(args, "code", code.String(), "err", status.Convert(err).Message())
	}
	i.log.Log(ctx, level, method, args...)
	return err
}

// levelOf: reads are for debugging, changes of state are news, and what is slow or went wrong is
// worth a look. A probe that runs out of time, or a question about what is gone, is normal life.
func levelOf(method string, code codes.Code, took time.Duration) slog.Level {
	switch code {
	case codes.Internal, codes.Unknown, codes.DataLoss:
		return slog.LevelError
	case codes.OK:
		if took > slow && !patient[method] {
			return slog.LevelWarn
		}
	case codes.NotFound, codes.Canceled:
		if !reads(method) {
			return slog.LevelWarn
		}
	case codes.DeadlineExceeded:
		if method == "ExecSync" {
			return slog.LevelInfo
		}
		return slog.LevelWarn
	default:
		return slog.LevelWarn
	}
	if reads(method) {
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

// reads tells the methods that change nothing, and ExecSync, which probes call all the time.
func reads(method string) bool {
	for _, prefix := range []string{"List", "Stream", "Get", "Image", "ExecSync"} {
		if strings.HasPrefix(method, prefix) {
			return true
		}
	}
	for _, suffix := range []string{"Status", "Stats", "Version", "RuntimeConfig"} {
		if strings.HasSuffix(method, suffix) {
			return method != "UpdateRuntimeConfig"
		}
	}
	return false
}

// subject is what a call is about, for the log. Credentials and commands are none of it.
func subject(req, resp any) []any {
	var args []any
	add := func(key, value string) {
		if value != "" {
			args = append(args, key, value)
		}
	}
	for _, m := range []any{req, resp} {
		if r, ok := m.(interface{ GetPodSandboxId() string }); ok {
			add("pod", r.GetPodSandboxId())
		}
		if r, ok := m.(interface{ GetContainerId() string }); ok {
			add("container", r.GetContainerId())
		}
	}
	switch r := req.(type) {
	case *cri.RunPodSandboxRequest:
		m := r.GetConfig().GetMetadata()
		add("name", m.GetNamespace()+"/"+m.GetName())
	case *cri.CreateContainerRequest:
		add("name", r.GetConfig().GetMetadata().GetName())
	case *cri.PullImageRequest:
		add("image", r.GetImage().GetImage())
	case *cri.RemoveImageRequest:
		add("image", r.GetImage().GetImage())
	}
	return args
}

// kinds of errors and their codes. The first that fits counts.
var kinds = []struct {
	is   func(error) bool
	code codes.Code
}{
	{errdefs.IsInvalidArgument, codes.InvalidArgument},
	{errdefs.IsNotFound, codes.NotFound},
	{errdefs.IsAlreadyExists, codes.AlreadyExists},
	{errdefs.IsFailedPrecondition, codes.FailedPrecondition},
	{errdefs.IsConflict, codes.FailedPrecondition},
	{errdefs.IsOutOfRange, codes.OutOfRange},
	{errdefs.IsResourceExhausted, codes.ResourceExhausted},
	{errdefs.IsNotImplemented, codes.Unimplemented},
	{errdefs.IsPermissionDenied, codes.PermissionDenied},
	{errdefs.IsUnauthorized, codes.Unauthenticated},
	{errdefs.IsAborted, codes.Aborted},
	{errdefs.IsDataLoss, codes.DataLoss},
	{errdefs.IsUnavailable, codes.Unavailable},
	{errdefs.IsDeadlineExceeded, codes.DeadlineExceeded},
	{errdefs.IsCanceled, codes.Canceled},
	{errdefs.IsInternal, codes.Internal},
}

// withCode gives an error the gRPC code of its kind; the text stays. An error that already has a
// code keeps it.
func withCode(err error) error {
	if err == nil {
		return nil
	}
	if st, ok := status.FromError(err); ok {
		return st.Err()
	}
	for _, k := range kinds {
		if k.is(err) {
			return status.Error(k.code, err.Error())
		}
	}
	return status.Error(codes.Unknown, err.Error())
}

// unimplemented is the answer to what this runtime does not do.
func unimplemented(what, why string) error {
	return fmt.Errorf("%s: %s: %w", what, why, errdefs.ErrNotImplemented)
}
