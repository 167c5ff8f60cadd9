package imagestore

import (
	"bytes"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// logged has what is logged until the test's end.
func logged(t *testing.T) *bytes.Buffer {
	log := &bytes.Buffer{}
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(log, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	return log
}

// TestReferredElsewhere: what a host answers that a registry has referred this machine to is in the log only.
func TestReferredElsewhere(t *testing.T) {
	const secret = "s3cr3t"
	status := http.StatusOK
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		w.WriteHeader(status)
		w.Write([]byte(secret))
	}))
	t.Cleanup(other.Close)
	log := logged(t)
	r, s := newTestRegistry(t), newStore(t)
	r.push("a", small("x"))
	host := strings.TrimPrefix(other.URL, "http://")
	to := func(path, address string) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, req *http.Request) bool {
			if !strings.Contains(req.URL.Path, path) {
				return false
			}
			http.Redirect(w, req, address, http.StatusTemporaryRedirect)
			return true
		}
	}
	token := func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+other.URL+`/token",service="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	for name, test := range map[string]struct {
		hook   func(http.ResponseWriter, *http.Request) bool
		status int
		kind   func(error) bool
		logged string
	}{
		"manifest":           {to("/manifests/", other.URL), 200, errdefs.IsInvalidArgument, "invalid character"},
		"manifest refused":   {to("/manifests/", other.URL), 403, errdefs.IsPermissionDenied, secret},
		"manifest not there": {to("/manifests/", other.URL), 404, errdefs.IsNotFound, secret},
		"manifest fails":     {to("/manifests/", other.URL), 503, errdefs.IsUnavailable, "503"},
		"configuration":      {to("/blobs/", other.URL), 200, errdefs.IsDataLoss, ""},
		"blob refused":       {to("/blobs/", other.URL), 418, errdefs.IsFailedPrecondition, secret},
		"no host":            {to("/manifests/", "http://127.0.0.1:1/x"), 200, errdefs.IsUnavailable, "127.0.0.1:1: connect: connection refused"},
		"no HTTP":            {to("/manifests/", "https://"+host), 200, errdefs.IsUnavailable, "server gave HTTP response"},
		"token":              {token, 200, errdefs.IsUnavailable, secret},
		"token refused":      {token, 401, errdefs.IsUnauthorized, ""},
		"token not there":    {token, 404, errdefs.IsNotFound, "404"},
	} {
		t.Run(name, func(t *testing.T) {
			log.Reset()
			r.on(test.hook)
			status = test.status
			_, err := s.Pull(t.Context(), r.host+"/a:1", nil)
			if !test.kind(err) || !strings.Contains(err.Error(), r.host+"/a:1") {
				t.Errorf("got %v", err)
			}
			for _, text := range []string{secret, "invalid character", host, "127.0.0.1:1", "refused:", "HTTP response", "/token"} {
				if err != nil && strings.Contains(strings.ReplaceAll(err.Error(), r.host, ""), text) {
					t.Errorf("%q is in: %v", text, err)
				}
			}
			if !strings.Contains(log.String(), test.logged) {
				t.Errorf("%q is not in the log: %s", test.logged, log.String())
			}
		})
	}
}
