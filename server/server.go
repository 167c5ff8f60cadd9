// Package server is Caisson's CRI: the RuntimeService and ImageService that the kubelet and crictl
// speak to. It translates and checks; the work is done by podvm and imagestore. The CRI's words
// and types end here: in the convert files on the way in and out, in status.go for errors.
package server

import (
	"context"
	"log/slog"
	"net"
	"sync"

	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxMessage is the largest gRPC message either way, in bytes: the kubelet's own limit.
const maxMessage = 16 << 20

// Options are what a server is made of.
type Options struct {
	Pods   Pods
	Images Images
	// Runtime and Network say why pods can't run, or can't be connected; nil when all is well. Each
	// may be nil itself.
	Runtime, Network func(ctx context.Context) error
	// Root is the folder of the pods, and of nothing else, for ImageFsInfo and the stats of writable layers.
	Root string
	// Version of the daemon.
	Version string
	// CgroupDriver is "systemd" or "cgroupfs"; empty: detected.
	CgroupDriver string
	// Features are reported to the kubelet, which then relies on them.
	Features Features
	// Info are facts for the verbose Status, encoded as JSON: the effective configuration, the
	// driver and why it was taken.
	Info map[string]any
	// Observer, where set, is told of every call.
	Observer Observer
	// Log; nil: slog's default.
	Log *slog.Logger
}

// Features are what pods can use with every runtime handler.
type Features struct {
	RecursiveReadOnlyMounts, UserNamespaces bool
}

// Server is the CRI of one daemon.
type Server struct {
	grpc  *grpc.Server
	close func() error
}

// New makes a server. It already listens on loopback for exec, attach and port-forward, whose
// URLs it hands out; Serve makes it reachable. Close it.
func New(ctx context.Context, o Options) (*Server, error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.CgroupDriver == "" {
		o.CgroupDriver = detectCgroupDriver()
	}
	streaming, err := newStreams(ctx, o.Pods, o.Log)
	if err != nil {
		return nil, err
	}
	i := interceptor{log: o.Log, observer: o.Observer}
	s := &Server{grpc: grpc.NewServer(
		grpc.UnaryInterceptor(i.unary), grpc.StreamInterceptor(i.stream),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
	)}
	s.close = sync.OnceValue(func() error {
		s.grpc.Stop()
		return streaming.Close()
	})
	cri.RegisterRuntimeServiceServer(s.grpc, &runtimeService{o: o, streams: streaming, rates: newRates()})
	cri.RegisterImageServiceServer(s.grpc, &imageService{o: o})
	return s, nil
}

// Serve answers calls on the listener until Close.
func (s *Server) Serve(l net.Listener) error { return s.grpc.Serve(l) }

// Close ends all calls and streams; it is idempotent. Pods are not touched.
func (s *Server) Close() error { return s.close() }

// runtimeService is the CRI's RuntimeService; its methods are in sandbox.go, container.go,
// stream.go, stats.go, events.go, metrics.go and runtime.go.
type runtimeService struct {
	cri.UnsafeRuntimeServiceServer // a missing method is an error of the compiler
	o                              Options
	streams                        *streams
	rates                          *rates
}

// imageService is the CRI's ImageService; see image.go.
type imageService struct {
	cri.UnsafeImageServiceServer
	o Options
}
