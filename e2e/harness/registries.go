package harness

import (
	"context"
	"sync"
	"testing"

	"github.com/caisson-vm/caisson/e2e/images"
	"github.com/caisson-vm/caisson/e2e/registry"
)

// User and Password open the private registry.
const (
	User     = "diver"
	Password = "down-below"
)

// Registries are the registries of one suite: Public stands in for the public ones, Private for
// one that wants a password.
type Registries struct {
	Public, Private *registry.Registry
}

// PrivateImage is how images.Private is pulled: by the registry's own address, because credentials
// for one registry are rightly not sent to another that stands in for it.
func (r *Registries) PrivateImage() string { return r.Private.Addr() + "/" + images.Private }

// SharedRegistries starts the suite's registries on first use; they end with the process.
func SharedRegistries(t testing.TB) *Registries {
	t.Helper()
	r, err := sharedRegistries()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

var sharedRegistries = sync.OnceValues(func() (*Registries, error) {
	all, err := images.Read(Images())
	if err != nil {
		return nil, err
	}
	r := &Registries{}
	if r.Public, err = registry.Start(registry.Options{}); err != nil {
		return nil, err
	}
	if r.Private, err = registry.Start(registry.Options{User: User, Password: Password}); err != nil {
		return nil, err
	}
	return r, r.load(all)
})

func (r *Registries) load(all []images.Image) error {
	for _, image := range all {
		to := r.Public
		if image.Refs[0] == images.Private {
			to = r.Private
		}
		if err := to.Load(context.Background(), []images.Image{image}); err != nil {
			return err
		}
	}
	return nil
}

// Configure writes the files that send a runtime to these registries.
func (r *Registries) Configure(t testing.TB, dir string) registry.Config {
	t.Helper()
	public := r.Public.Addr()
	c, err := registry.WriteConfig(dir, map[string]string{
		"docker.io": public, "registry.k8s.io": public, "k8s.gcr.io": public, "gcr.io": public,
		// Nothing listens on the discard port.
		"down.test": "127.0.0.1:9",
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}
