package imagestore

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caisson-vm/caisson/imagestore/internal/torture"
)

const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	dockerLayer    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
)

// testRegistry is a real registry in this process. Its hook sees each request first and may answer
// it, by returning true.
type testRegistry struct {
	t     testing.TB
	host  string
	hook  atomic.Pointer[func(http.ResponseWriter, *http.Request) bool]
	blobs atomic.Int64 // layers and configurations asked for
}

func newTestRegistry(t testing.TB) *testRegistry {
	t.Helper()
	r := &testRegistry{t: t}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if hook := r.hook.Load(); hook != nil && (*hook)(w, req) {
			return
		}
		if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/") {
			r.blobs.Add(1)
		}
		inner.ServeHTTP(w, req)
	}))
	t.Cleanup(server.Close)
	r.host = strings.TrimPrefix(server.URL, "http://")
	return r
}

func (r *testRegistry) on(hook func(http.ResponseWriter, *http.Request) bool) { r.hook.Store(&hook) }

// send puts a blob (path "blobs/uploads/") or manifest (path "manifests/<tag>") into the registry.
func (r *testRegistry) send(method, repo, path, kind string, body []byte) {
	r.t.Helper()
	req, err := http.NewRequest(method, "http://"+r.host+"/v2/"+repo+"/"+path, bytes.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Content-Type", kind)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		text, _ := io.ReadAll(resp.Body)
		r.t.Fatalf("%s %s: %s: %s", method, path, resp.Status, text)
	}
}

func (r *testRegistry) blob(repo, kind string, body []byte) ocispec.Descriptor {
	r.t.Helper()
	d := digest.FromBytes(body)
	r.send(http.MethodPost, repo, "blobs/uploads/?digest="+d.String(), "application/octet-stream", body)
	return ocispec.Descriptor{MediaType: kind, Digest: d, Size: int64(len(body))}
}

// testImage is what push makes a real image of; zero fields get what is usual.
type testImage struct {
	layers       [][]byte // plain tar archives
	pack         func([]byte) []byte
	layerType    string
	manifestType string
	configType   string
	config       ocispec.Image
	diffIDs      []digest.Digest // instead of the right ones
	tamper       func(*ocispec.Manifest)
	tag          string
}

// push puts an image into the registry and returns the digests of its configuration and manifest.
func (r *testRegistry) push(repo string, i testImage) (config, manifest ocispec.Descriptor) {
	r.t.Helper()
	fill(&i.manifestType, ocispec.MediaTypeImageManifest)
	fill(&i.configType, ocispec.MediaTypeImageConfig)
	fill(&i.layerType, ocispec.MediaTypeImageLayerGzip)
	fill(&i.tag, "1")
	fill(&i.config.OS, "linux")
	fill(&i.config.Architecture, runtime.GOARCH)
	if i.pack == nil {
		i.pack = gzipped
	}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: i.manifestType}
	i.config.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: i.diffIDs}
	for _, plain := range i.layers {
		m.Layers = append(m.Layers, r.blob(repo, i.layerType, i.pack(plain)))
		if i.diffIDs == nil {
			i.config.RootFS.DiffIDs = append(i.config.RootFS.DiffIDs, digest.FromBytes(plain))
		}
	}
	m.Config = r.blob(repo, i.configType, toJSON(i.config))
	if i.tamper != nil {
		i.tamper(&m)
	}
	body := toJSON(m)
	r.send(http.MethodPut, repo, "manifests/"+i.tag, i.manifestType, body)
	return m.Config, ocispec.Descriptor{MediaType: i.manifestType, Digest: digest.FromBytes(body), Size: int64(len(body))}
}

func fill(s *string, value string) {
	if *s == "" {
		*s = value
	}
}

func toJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

func gzipped(plain []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(plain)
	w.Close()
	return b.Bytes()
}

func zstded(plain []byte) []byte {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	return w.EncodeAll(plain, nil)
}

// zstdChunked is as zstd:chunked is: several frames, and skippable ones with the table of contents.
func zstdChunked(plain []byte) []byte {
	half := len(plain) / 2
	skippable := []byte{0x50, 0x2A, 0x4D, 0x18, 4, 0, 0, 0, 't', 'o', 'c', '!'}
	return bytes.Join([][]byte{zstded(plain[:half]), zstded(plain[half:]), skippable}, nil)
}

func asIs(plain []byte) []byte { return plain }

// small is an image of one file with the given content.
func small(content string) testImage {
	t := torture.NewTar()
	t.Dir("etc")
	t.File("etc/file", content)
	return testImage{layers: [][]byte{t.Bytes()}}
}

func large(seed uint64, mib int) testImage {
	t := torture.NewTar()
	t.File("large", torture.Noise(mib<<20, seed))
	return testImage{layers: [][]byte{t.Bytes()}}
}

// newStore opens a store whose configuration is isolated from the machine's.
func newStore(t testing.TB, change ...func(*Options)) *Store {
	t.Helper()
	dir := t.TempDir()
	o := Options{Root: filepath.Join(dir, "images"), Puller: testPuller, RegistriesConf: filepath.Join(dir, "registries.conf"),
		AuthFile: filepath.Join(dir, "auth.json"), Policy: filepath.Join(dir, "policy.json"), PullProgressTimeout: 20 * time.Second}
	writeFile(t, o.RegistriesConf, "")
	writeFile(t, o.Policy, `{"default":[{"type":"insecureAcceptAnything"}]}`)
	for _, c := range change {
		c(&o)
	}
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func writeFile(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func mustPull(t testing.TB, s *Store, ref string) Image {
	t.Helper()
	i, err := s.Pull(t.Context(), ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// leftovers lists what is in the store's directory but belongs to no image.
func leftovers(t testing.TB, s *Store) string {
	t.Helper()
	var found []string
	known := map[string]bool{".lock": true, "staging": true}
	for _, i := range s.Images() {
		hex := digest.Digest(i.ID).Encoded()
		known[hex+".json"], known[hex+".erofs"] = true, true
	}
	for _, dir := range []string{s.o.Root, s.staging} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if !known[e.Name()] && !strings.HasPrefix(e.Name(), "short-names.conf") {
				found = append(found, fmt.Sprintf("%s/%s", filepath.Base(dir), e.Name()))
			}
		}
	}
	return strings.Join(found, " ")
}

// TestRef: of an image that came from several places, the digest is that of the place that is meant.
func TestRef(t *testing.T) {
	digest := func(c string) string { return "@sha256:" + strings.Repeat(c, 64) }
	i := Image{ID: "sha256:" + strings.Repeat("1", 64), Digests: []string{
		"docker.io/library/busybox" + digest("a"), "docker.io/library/busybox" + digest("b"), "docker.io/library/busybox-extra" + digest("c"), "registry.example:5000/team/web" + digest("d"),
	}}
	for name, want := range map[string]string{
		"busybox":                             i.Digests[0],
		"docker.io/busybox:1.36":              i.Digests[0],
		"busybox" + digest("b"):               i.Digests[1],
		"busybox:1.36" + digest("b"):          i.Digests[1],
		"busybox" + digest("e"):               i.Digests[0],
		"busybox-extra:1":                     i.Digests[2],
		"registry.example:5000/team/web:v1":   i.Digests[3],
		"registry.example:5000/team/web-more": i.Digests[0],
		i.ID:                                  i.Digests[0],
		"":                                    i.Digests[0],
		"No:Name":                             i.Digests[0],
	} {
		if got := i.Ref(name); got != want {
			t.Errorf("%q: got %s, want %s", name, got, want)
		}
	}
	if got := (Image{ID: i.ID}).Ref("busybox"); got != i.ID {
		t.Errorf("without digests: %s", got)
	}
}
