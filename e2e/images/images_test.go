package images

import (
	"archive/tar"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

// built are the images as go run ./e2e/prepare leaves them.
var built = filepath.Join("..", "..", "build", "images")

func TestBuiltImagesAreWhole(t *testing.T) {
	all, err := Read(built)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, image := range all {
		ref := image.Refs[0]
		seen[ref] = true
		err := whole(image)
		if broken := ref == Garbage || ref == WrongDiffID; (err != nil) != broken {
			t.Errorf("%s: broken is %v, but %v", ref, broken, err)
		}
	}
	for _, ref := range []string{Busybox, Nginx, Torture, Stateful, Private, Large, Garbage, WrongDiffID} {
		if !seen[ref] {
			t.Errorf("%s was not built", ref)
		}
	}
}

// whole checks an image, or all of an index, as a runtime would.
func whole(i Image) error {
	if i.Index == nil {
		return wholeImage(i.Single)
	}
	manifest, err := i.Index.IndexManifest()
	if err != nil {
		return err
	}
	for _, d := range manifest.Manifests {
		single, err := i.Index.Image(d.Digest)
		if err != nil {
			return err
		}
		if err := wholeImage(single); err != nil {
			return err
		}
	}
	return nil
}

// wholeImage reads each layer as an archive and compares its DiffID.
func wholeImage(image v1.Image) error {
	config, err := image.ConfigFile()
	if err != nil {
		return err
	}
	layers, err := image.Layers()
	if err != nil {
		return err
	}
	for i, layer := range layers {
		r, err := layer.Uncompressed()
		if err != nil {
			return err
		}
		defer r.Close()
		hash := sha256.New()
		archive := tar.NewReader(io.TeeReader(r, hash))
		for err == nil {
			_, err = archive.Next()
		}
		if !errors.Is(err, io.EOF) {
			return err
		}
		if _, err := io.Copy(hash, struct{ io.Reader }{r}); err != nil {
			return err
		}
		if got, want := fmt.Sprintf("sha256:%x", hash.Sum(nil)), config.RootFS.DiffIDs[i].String(); got != want {
			return fmt.Errorf("layer %d is %s, its configuration says %s", i, got, want)
		}
	}
	return nil
}

// The expectation that a running container is compared with is itself compared with what another
// implementation makes of the layers.
func TestTortureFilesAgainstAnotherImplementation(t *testing.T) {
	bottom, err := new(Layer).Dir("etc", 0o755).Build(compression.GZip)
	if err != nil {
		t.Fatal(err)
	}
	all, err := torture(t.Context(), "", &base{layer: bottom})
	if err != nil {
		t.Fatal(err)
	}
	r := mutate.Extract(all[0].Single)
	defer r.Close()
	want := TortureFiles()
	archive := tar.NewReader(r)
	got := 0
	for {
		h, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(path.Clean(h.Name), "/")
		if name != TortureDir && !strings.HasPrefix(name, TortureDir+"/") {
			continue
		}
		if strings.HasPrefix(name, TortureDir+"/opaque/") {
			continue // the other implementation knows no opaque directories
		}
		got++
		if _, ok := want[name]; !ok {
			t.Errorf("%s is not expected", name)
		}
	}
	var opaque []string
	for name := range want {
		if rest, ok := strings.CutPrefix(name, TortureDir+"/opaque/"); ok {
			opaque = append(opaque, rest)
		}
	}
	slices.Sort(opaque)
	if shown := []string{"a-before-the-marker", "shown"}; !slices.Equal(opaque, shown) {
		t.Errorf("the opaque directory holds %q, want %q", opaque, shown)
	}
	if got != len(want)-len(opaque) {
		t.Errorf("got %d files, want %d", got, len(want)-len(opaque))
	}
}
