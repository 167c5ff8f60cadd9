// Package registry runs an image registry in the test's own process, on loopback. It serves the
// images of e2e/images, can ask for a password, and can fail in the ways networks do. With the
// configuration that it writes, a runtime finds the images under their public names.
package registry

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"

	"github.com/caisson-vm/caisson/e2e/images"
	"github.com/google/go-containerregistry/pkg/registry"
)

// Options say what a registry serves and to whom.
type Options struct {
	// User and Password, where set, are asked for by basic authentication.
	User, Password string
}

// Registry is a running registry.
type Registry struct {
	options  Options
	listener net.Listener
	server   *http.Server
	backend  http.Handler

	mu     sync.Mutex
	faults map[string]*Fault // by repository, as the mirror names it
}

// Start runs a registry on a free port of 127.0.0.1, in the network namespace of the caller.
func Start(o Options) (*Registry, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	r := &Registry{
		options:  o,
		listener: l,
		backend:  registry.New(registry.Logger(log.New(io.Discard, "", 0))),
		faults:   map[string]*Fault{},
	}
	r.server = &http.Server{Handler: http.HandlerFunc(r.serve), ErrorLog: log.New(io.Discard, "", 0)}
	go func() {
		if err := r.server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			panic(fmt.Sprintf("registry %s: %v", l.Addr(), err))
		}
	}()
	return r, nil
}

// Addr is where it listens, host:port.
func (r *Registry) Addr() string { return r.listener.Addr().String() }

// Close ends it and its connections.
func (r *Registry) Close() error { return r.server.Close() }

// Load copies images into the registry, without a password and without faults.
func (r *Registry) Load(ctx context.Context, all []images.Image) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("load images: %w", err)
	}
	back := &http.Server{Handler: r.backend, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan error, 1)
	go func() { done <- back.Serve(l) }()
	for _, image := range all {
		if err = image.Push(ctx, l.Addr().String()); err != nil {
			break
		}
	}
	return errors.Join(err, back.Close(), ignore(<-done, http.ErrServerClosed))
}

func ignore(err, target error) error {
	if errors.Is(err, target) {
		return nil
	}
	return err
}

func (r *Registry) serve(w http.ResponseWriter, req *http.Request) {
	if !r.allowed(req) {
		w.Header().Set("WWW-Authenticate", `Basic realm="caisson e2e"`)
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
		return
	}
	if fault := r.fault(req); fault != nil {
		w = fault.wrap(w, req)
	}
	r.backend.ServeHTTP(w, req)
}

func (r *Registry) allowed(req *http.Request) bool {
	if r.options.User == "" {
		return true
	}
	user, password, ok := req.BasicAuth()
	same := func(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }
	return ok && same(user, r.options.User) && same(password, r.options.Password)
}

// fault returns what shall go wrong with the request, if anything.
func (r *Registry) fault(req *http.Request) *Fault {
	repo, digest, ok := strings.Cut(strings.TrimPrefix(req.URL.Path, "/v2/"), "/blobs/")
	if !ok || req.Method != http.MethodGet || strings.Contains(digest, "/") {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.faults[repo]
}
