package registry

import (
	"bytes"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/e2e/images"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

const ref = "docker.io/caisson/random:1"

// start runs a registry with one random image of a large layer and returns the image's address in it.
func start(t *testing.T, o Options) (*Registry, name.Reference, v1.Image) {
	t.Helper()
	r, err := Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	image, err := random.Image(1<<20, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Load(t.Context(), []images.Image{{Refs: []string{ref}, Single: image}}); err != nil {
		t.Fatal(err)
	}
	at, err := name.ParseReference(r.Addr()+"/docker.io/caisson/random:1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	return r, at, image
}

// layer downloads the image's only layer, compressed.
func layer(t *testing.T, at name.Reference, image v1.Image) ([]byte, error) {
	t.Helper()
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	url := "http://" + at.Context().RegistryStr() + "/v2/" + at.Context().RepositoryStr() + "/blobs/" + digest.String()
	response, err := http.Get(url)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	return io.ReadAll(response.Body)
}

func TestServesWhatWasLoaded(t *testing.T) {
	_, at, image := start(t, Options{})
	got, err := remote.Image(at)
	if err != nil {
		t.Fatal(err)
	}
	want, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if digest, err := got.Digest(); err != nil || digest != want {
		t.Fatalf("got %v, %v, want %v", digest, err, want)
	}
}

func TestPassword(t *testing.T) {
	_, at, _ := start(t, Options{User: "diver", Password: "right"})
	for password, ok := range map[string]bool{"right": true, "wrong": false, "": false} {
		_, err := remote.Image(at, remote.WithAuth(&authn.Basic{Username: "diver", Password: password}))
		if (err == nil) != ok {
			t.Errorf("password %q: %v", password, err)
		}
	}
}

func TestFaults(t *testing.T) {
	r, at, image := start(t, Options{})
	whole, err := layer(t, at, image)
	if err != nil {
		t.Fatal(err)
	}
	cut := r.Break(ref, Cut, 1000)
	if got, err := layer(t, at, image); err == nil || len(got) > 1000 {
		t.Errorf("cut: got %d bytes, %v", len(got), err)
	}
	<-cut.Hit()
	r.Break(ref, Corrupt, 1000)
	got, err := layer(t, at, image)
	if err != nil || len(got) != len(whole) || bytes.Equal(got, whole) || !bytes.Equal(got[:1000], whole[:1000]) {
		t.Errorf("corrupt: got %d bytes of %d, %v", len(got), len(whole), err)
	}
	r.Mend(ref)
	if got, err := layer(t, at, image); err != nil || !bytes.Equal(got, whole) {
		t.Errorf("mended: got %d bytes of %d, %v", len(got), len(whole), err)
	}
}

func TestStallEndsWithTheConnection(t *testing.T) {
	r, at, image := start(t, Options{})
	stall := r.Break(ref, Stall, 1000)
	result := make(chan error, 1)
	go func() {
		_, err := layer(t, at, image)
		result <- err
	}()
	<-stall.Hit()
	select {
	case err := <-result:
		t.Fatalf("the transfer ended by itself: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	r.server.Close()
	if err := <-result; err == nil {
		t.Fatal("a stalled transfer succeeded")
	}
}
