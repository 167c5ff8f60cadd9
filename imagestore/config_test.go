package imagestore

import (
	"bytes"
	"net/http"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// allocated returns how many bytes f has allocated, all of this process meanwhile included.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestConfigIsDecodedOnce has an image whose configuration takes more than 100 times its size to decode as a whole.
func TestConfigIsDecodedOnce(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	i := small("x")
	used := ocispec.ImageConfig{User: "me", Env: []string{"A=b"}, Entrypoint: []string{"/sh"}, Cmd: []string{"-c", ""}, WorkingDir: "/w", StopSignal: "SIGINT", Volumes: map[string]struct{}{"/v": {}}}
	i.config.Config = used
	i.config.Config.Labels = map[string]string{"a": "b"}
	i.config.History = make([]ocispec.History, maxConfig/3-300) // each is {}
	r.push("a", i)
	config, err := s.Config(mustPull(t, s, r.host+"/a:1").ID)
	if err != nil || len(config) < maxConfig*9/10 {
		t.Fatalf("configuration of %d bytes, %v", len(config), err)
	}
	i.tag = "2"
	for range 2 {
		r.push("b", i)
		mustPull(t, s, r.host+"/b:2") // the configuration goes on from record to record
		if took := allocated(func() {
			for range 10 {
				if all := s.Images(); len(all) != 1 || !reflect.DeepEqual(all[0].Config.Config, used) {
					t.Errorf("images %+v", all)
				}
			}
		}); took > maxConfig/4 {
			t.Errorf("ten listings took %d bytes", took)
		}
		if got, err := s.Config(r.host + "/b:2"); err != nil || !bytes.Equal(got, config) {
			t.Errorf("configuration of %d bytes, %v", len(got), err)
		}
		s = reopen(t, s)
	}
	if took := allocated(func() {
		if _, err := parseConfig(config); err != nil {
			t.Error(err)
		}
	}); took > maxConfig/4 {
		t.Errorf("to decode it took %d bytes", took)
	}
}

// TestBloatedManifests are refused before they are decoded.
func TestBloatedManifests(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	list := func(n int) string { return "[" + strings.Repeat("{},", n-1) + "{}]" }
	head := `{"schemaVersion":2,"mediaType":"`
	for name, test := range map[string]struct{ kind, body string }{
		"many layers":         {ocispec.MediaTypeImageManifest, list(maxManifest/3-100) + `}`},
		"many layers, 4 MiB":  {ocispec.MediaTypeImageManifest, list(4<<20/3-100) + `}`},
		"many, of Docker":     {dockerManifest, list(maxManifest/3-100) + `}`},
		"many in an index":    {ocispec.MediaTypeImageIndex, list(maxManifest/3-100) + `}`},
		"many unknown fields": {ocispec.MediaTypeImageManifest, `[],"signatures":` + list(maxManifest/3-100) + `}`},
		"an annotation":       {ocispec.MediaTypeImageManifest, `[],"annotations":{"a":"` + strings.Repeat("a", maxManifest) + `"}}`},
	} {
		field := `","layers":`
		if test.kind == ocispec.MediaTypeImageIndex {
			field = `","manifests":`
		}
		body := []byte(head + test.kind + field + test.body)
		r.on(func(w http.ResponseWriter, req *http.Request) bool {
			if !strings.Contains(req.URL.Path, "/manifests/") {
				return false
			}
			w.Header().Set("Content-Type", test.kind)
			w.Write(body)
			return true
		})
		for _, ref := range []string{"/a:1", "/a@" + digest.FromBytes(body).String()} {
			n, err := s.registries.resolve(r.host + ref)
			if err != nil {
				t.Fatal(err)
			}
			// To read it, as the process of a pull does, takes some five times its size.
			if took := allocated(func() {
				if _, err := s.registries.open(t.Context(), n, nil); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "values; push") {
					t.Errorf("%s, %s: %v", name, ref, err)
				}
			}); took > uint64(10*len(body)) {
				t.Errorf("%s, %s: took %d bytes", name, ref, took)
			}
		}
	}
}

// TestLargestManifest: real images with as many layers as possible, and annotations, are far from being refused.
func TestLargestManifest(t *testing.T) {
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for range maxLayers {
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerZstd, Digest: digest.FromString("x"), Size: 1 << 40, Annotations: map[string]string{
			"io.github.containers.zstd-chunked.manifest-checksum": digest.FromString("x").String(), "io.github.containers.zstd-chunked.manifest-position": "1234567890:1234567:12345678:1",
			"io.github.containers.zstd-chunked.tarsplit-position": "1234567890:1234567:12345678", "org.opencontainers.image.title": strings.Repeat("x", 100),
		}})
	}
	if body := toJSON(m); len(body) > maxManifest*3/4 || values(body) > maxValues/2 {
		t.Errorf("%d bytes, %d values", len(body), values(body))
	}
	for doc, want := range map[string]int{`1`: 1, `{"a":1,"b":[1,2]}`: 5, `"a,[{"`: 1, `"\"",`: 2, `["\\",","]`: 3, ``: 1} {
		if got := values([]byte(doc)); got != want {
			t.Errorf("%s: %d values, want %d", doc, got, want)
		}
	}
}

// TestDigestsAreBounded: a registry has an image under another manifest at each pull.
func TestDigestsAreBounded(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	var last Image
	var manifest ocispec.Descriptor
	for n := range maxDigests + 3 {
		i := small("x")
		i.tamper = func(m *ocispec.Manifest) { m.Annotations = map[string]string{"n": strings.Repeat("n", n)} }
		_, manifest = r.push("a", i)
		last = mustPull(t, s, r.host+"/a:1")
	}
	if len(last.Digests) != maxDigests || last.Ref(r.host+"/a@"+manifest.Digest.String()) != r.host+"/a@"+manifest.Digest.String() {
		t.Errorf("%d digests, %v", len(last.Digests), last.Digests)
	}
}
