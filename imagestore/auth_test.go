package imagestore

import (
	"net/http"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestAuthIsFor(t *testing.T) {
	for _, c := range []struct {
		address, registry string
		want              bool
	}{
		{"", "quay.io", true}, {"quay.io", "quay.io", true}, {"https://Quay.io/v2/", "quay.io", true}, {"quay.io", "quay.io:443", false},
		{"https://index.docker.io/v1/", "docker.io", true}, {"docker.io", "docker.io", true}, {"registry-1.docker.io", "docker.io", true},
		{"docker.io", "quay.io", false}, {"evil.quay.io", "quay.io", false}, {"https://quay.io@evil.io/", "quay.io", false}, {"r:5000", "r:5000", true}, {"r:5000", "r:5001", false},
	} {
		if got := (&Auth{ServerAddress: c.address}).isFor(c.registry); got != c.want {
			t.Errorf("credentials of %q for %s: %t", c.address, c.registry, got)
		}
	}
}

func TestAuth(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	r.push("private", small("secret"))
	r.on(func(w http.ResponseWriter, req *http.Request) bool {
		if user, password, _ := req.BasicAuth(); user == "me" && password == "right" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
		return true
	})
	ref := r.host + "/private:1"
	for name, auth := range map[string]*Auth{"none": nil, "wrong": {Username: "me", Password: "wrong"}} {
		_, err := s.Pull(t.Context(), ref, auth)
		if !errdefs.IsUnauthorized(err) || !strings.Contains(err.Error(), "credentials") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Pull(t.Context(), ref, &Auth{Auth: "%"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("not base64: %v", err)
	}
	asked := r.blobs.Load()
	for name, auth := range map[string]*Auth{
		"password for another": {Username: "me", Password: "right", ServerAddress: "https://index.docker.io/v1/"},
		"auth for another":     {Auth: "bWU6cmlnaHQ=", ServerAddress: "127.0.0.1"},
		"token for another":    {RegistryToken: "right", ServerAddress: "quay.io"},
	} {
		if _, err := s.Pull(t.Context(), ref, auth); !errdefs.IsUnauthorized(err) || r.blobs.Load() != asked {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, auth := range map[string]*Auth{
		"password": {Username: "me", Password: "right"}, "auth": {Auth: "bWU6cmlnaHQ="},
		"address": {Username: "me", Password: "right", ServerAddress: r.host}, "URL": {Username: "me", Password: "right", ServerAddress: "https://" + r.host + "/v1/"},
	} {
		if _, err := s.Pull(t.Context(), ref, auth); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	writeFile(t, s.o.AuthFile, `{"auths":{"`+r.host+`":{"auth":"bWU6cmlnaHQ="}}}`)
	if _, err := s.Pull(t.Context(), ref, nil); err != nil {
		t.Errorf("auth file: %v", err)
	}
	if _, err := s.Pull(t.Context(), ref, &Auth{Username: "me", Password: "wrong"}); err == nil {
		t.Error("an image that is there was given to wrong credentials")
	}
}

func TestTokens(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	r.push("private", small("secret"))
	r.on(func(w http.ResponseWriter, req *http.Request) bool {
		if req.URL.Path == "/token" {
			if err := req.ParseForm(); err == nil && req.Form.Get("refresh_token") == "identity" {
				w.Write([]byte(`{"access_token":"good"}`))
				return true
			}
			http.Error(w, "no", http.StatusUnauthorized)
			return true
		}
		if req.Header.Get("Authorization") == "Bearer good" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.host+`/token",service="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	for name, auth := range map[string]*Auth{"identity": {IdentityToken: "identity"}, "registry": {RegistryToken: "good"}} {
		if _, err := s.Pull(t.Context(), r.host+"/private:1", auth); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Pull(t.Context(), r.host+"/private:1", &Auth{IdentityToken: "bad"}); !errdefs.IsUnauthorized(err) {
		t.Errorf("bad token: %v", err)
	}
}
