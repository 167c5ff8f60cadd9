package imagestore

import (
	"context"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/imagestore/internal/torture"
)

// content mounts an image's file and reads etc/file in it.
func content(t *testing.T, s *Store, id string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", s.imagePath(digest.Digest(id)), dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	defer exec.Command("umount", dir).Run()
	data, err := os.ReadFile(filepath.Join(dir, "etc/file"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestPullKindsOfImages(t *testing.T) {
	r := newTestRegistry(t)
	s := newStore(t)
	for name, change := range map[string]func(*testImage){
		"oci-gzip":     func(*testImage) {},
		"oci-zstd":     func(i *testImage) { i.pack, i.layerType = zstded, ocispec.MediaTypeImageLayerZstd },
		"zstd-chunked": func(i *testImage) { i.pack, i.layerType = zstdChunked, ocispec.MediaTypeImageLayerZstd },
		"oci-plain":    func(i *testImage) { i.pack, i.layerType = asIs, ocispec.MediaTypeImageLayer },
		"docker": func(i *testImage) {
			i.manifestType, i.configType, i.layerType = dockerManifest, dockerConfig, dockerLayer
		},
		"mislabelled": func(i *testImage) { i.pack, i.layerType = zstded, ocispec.MediaTypeImageLayerGzip },
		"layer twice": func(i *testImage) { i.layers = append(i.layers, i.layers[0]) },
	} {
		t.Run(name, func(t *testing.T) {
			i := small("content of " + name)
			i.config.Config.Env = []string{"A=b"}
			change(&i)
			repo := strings.ReplaceAll(name, " ", "-")
			config, manifest := r.push(repo, i)
			got := mustPull(t, s, r.host+"/"+repo+":1")
			if got.ID != config.Digest.String() || !slices.Equal(got.Tags, []string{r.host + "/" + repo + ":1"}) ||
				!slices.Equal(got.Digests, []string{r.host + "/" + repo + "@" + manifest.Digest.String()}) {
				t.Errorf("got %+v", got)
			}
			raw, err := s.Config(got.ID)
			if got.Config.Config.Env[0] != "A=b" || err != nil || digest.FromBytes(raw).String() != got.ID || got.Size <= 0 {
				t.Errorf("got %+v, %v", got, err)
			}
			if c := content(t, s, got.ID); c != "content of "+name {
				t.Errorf("content %q", c)
			}
		})
	}
	if l := leftovers(t, s); l != "" {
		t.Errorf("left behind: %s", l)
	}
}

// TestCompressionsGiveTheSameImage has one layer: where the content of several is depends on how they arrive.
func TestCompressionsGiveTheSameImage(t *testing.T) {
	var files [][]byte
	layers, err := torture.Layers(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, pack := range []func([]byte) []byte{gzipped, zstdChunked} {
		r, s := newTestRegistry(t), newStore(t)
		r.push("a", testImage{layers: layers[:1], pack: pack})
		data, err := os.ReadFile(s.imagePath(digest.Digest(mustPull(t, s, r.host+"/a:1").ID)))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, data)
	}
	if !slices.Equal(files[0], files[1]) {
		t.Error("the files differ")
	}
}

func TestPullByDigestAndFromIndex(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	other := small("for another machine")
	other.config.Architecture, other.tag = "riscv64", "riscv64"
	_, theirs := r.push("a", other)
	theirs.Platform = &ocispec.Platform{OS: "linux", Architecture: "riscv64"}
	mine := small("for this machine")
	mine.tag = "mine"
	config, ours := r.push("a", mine)
	ours.Platform = &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	index := toJSON(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{theirs, ours}})
	r.send(http.MethodPut, "a", "manifests/index", ocispec.MediaTypeImageIndex, index)
	byIndex := r.host + "/a@" + digest.FromBytes(index).String()

	got := mustPull(t, s, r.host+"/a:index")
	if got.ID != config.Digest.String() || !slices.Equal(got.Digests, []string{byIndex}) {
		t.Errorf("got %+v", got)
	}
	got = mustPull(t, s, r.host+"/a:ignored@"+ours.Digest.String())
	if got.ID != config.Digest.String() || len(got.Tags) != 1 || len(got.Digests) != 2 {
		t.Errorf("got %+v", got)
	}
	for _, ref := range []string{byIndex, r.host + "/a:index", got.ID, got.ID[7:20], got.ID[:20], r.host + "/a:x@" + ours.Digest.String()} {
		if i, err := s.Image(ref); err != nil || i.ID != got.ID {
			t.Errorf("%s: %+v, %v", ref, i, err)
		}
	}
	only := toJSON(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{theirs}})
	r.send(http.MethodPut, "a", "manifests/only", ocispec.MediaTypeImageIndex, only)
	for _, ref := range []string{"/a:only", "/a:riscv64"} {
		if _, err := s.Pull(t.Context(), r.host+ref, nil); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", ref, err)
		}
	}
}

func volumes(n int) map[string]struct{} {
	all := map[string]struct{}{}
	for i := range n {
		all[strings.Repeat("/v", 10)+strconv.Itoa(i)] = struct{}{}
	}
	return all
}

func TestRefusedImages(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	for name, test := range map[string]struct {
		change func(*testImage)
		kind   func(error) bool
		says   string
	}{
		"encrypted":    {func(i *testImage) { i.layerType = ocispec.MediaTypeImageLayerGzip + "+encrypted" }, errdefs.IsNotImplemented, "encrypted"},
		"artifact":     {func(i *testImage) { i.configType = "application/vnd.cncf.helm.config.v1+json" }, errdefs.IsInvalidArgument, "artifact"},
		"no archive":   {func(i *testImage) { i.layerType = "text/html" }, errdefs.IsInvalidArgument, "text/html"},
		"wrong-diffid": {func(i *testImage) { i.diffIDs = []digest.Digest{digest.FromString("x")} }, errdefs.IsDataLoss, "configuration says"},
		"diffid-count": {func(i *testImage) { i.diffIDs = []digest.Digest{digest.FromString("x"), digest.FromString("y")} }, errdefs.IsInvalidArgument, "names 2"},
		"not-gzip":     {func(i *testImage) { i.pack = func(b []byte) []byte { return append([]byte{0x1f, 0x8b}, b...) } }, errdefs.IsInvalidArgument, "decompress"},
		"cut-gzip":     {func(i *testImage) { i.pack = func(b []byte) []byte { p := gzipped(b); return p[:len(p)/2] } }, errdefs.IsInvalidArgument, "layer 1 of 1"},
		"not-tar":      {func(i *testImage) { i.layers = [][]byte{[]byte(strings.Repeat("no tar ", 300))} }, errdefs.IsInvalidArgument, "layer 1 of 1"},
		"longer":       {func(i *testImage) { i.tamper = func(m *ocispec.Manifest) { m.Layers[0].Size-- } }, errdefs.IsDataLoss, "longer"},
		"long-user":    {func(i *testImage) { i.config.Config.User = strings.Repeat("u", 257) }, errdefs.IsInvalidArgument, "user's name"},
		"large-env":    {func(i *testImage) { i.config.Config.Env = []string{"A=" + strings.Repeat("a", maxUsed)} }, errdefs.IsInvalidArgument, "environment"},
		"many-args":    {func(i *testImage) { i.config.Config.Cmd = make([]string, maxUsed/16+1) }, errdefs.IsInvalidArgument, "command"},
		"many-volumes": {func(i *testImage) { i.config.Config.Volumes = volumes(2000) }, errdefs.IsInvalidArgument, "volumes"},
		"large-config": {func(i *testImage) { i.config.Author = strings.Repeat("a", maxConfig) }, errdefs.IsInvalidArgument, "configuration of"},
		"huge":         {func(i *testImage) { i.tamper = func(m *ocispec.Manifest) { m.Layers[0].Size = 1 << 60 } }, errdefs.IsResourceExhausted, "bytes together"},
	} {
		t.Run(name, func(t *testing.T) {
			i := small("x")
			test.change(&i)
			repo := strings.ReplaceAll(name, " ", "-")
			r.push(repo, i)
			_, err := s.Pull(t.Context(), r.host+"/"+repo+":1", nil)
			if !test.kind(err) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v", err)
			}
		})
	}
	r.on(func(w http.ResponseWriter, req *http.Request) bool {
		if !strings.Contains(req.URL.Path, "/manifests/") {
			return false
		}
		w.Header().Set("Content-Type", "application/vnd.docker.distribution.manifest.v1+prettyjws")
		w.Write([]byte(`{"schemaVersion":1,"name":"old","tag":"1","architecture":"amd64","fsLayers":[],"history":[]}`))
		return true
	})
	if _, err := s.Pull(t.Context(), r.host+"/old:1", nil); !errdefs.IsNotImplemented(err) {
		t.Errorf("schema 1: %v", err)
	}
	if l := leftovers(t, s); l != "" || len(s.Images()) != 0 {
		t.Errorf("left behind: %s, %v", l, s.Images())
	}
}

func TestNotThere(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	r.push("a", small("x"))
	for _, ref := range []string{"/b:1", "/a:2", "/a@" + digest.FromString("x").String()} {
		if _, err := s.Pull(t.Context(), r.host+ref, nil); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", ref, err)
		}
	}
	r.on(func(w http.ResponseWriter, req *http.Request) bool {
		http.Error(w, "<html>not here", http.StatusNotFound)
		return strings.Contains(req.URL.Path, "/manifests/")
	})
	if _, err := s.Pull(t.Context(), "127.0.0.1:1/a:1", nil); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "127.0.0.1:1: connect: connection refused") {
		t.Errorf("registry down: %v", err)
	}
	for _, ref := range []string{"", "UPPER", "a b", "a@sha256:xyz", "../a", strings.Repeat("a", 300)} {
		if _, err := s.Pull(t.Context(), ref, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", ref, err)
		}
		if _, err := s.Image(ref); err == nil {
			t.Errorf("%q found", ref)
		}
	}
}

func TestRegistriesConf(t *testing.T) {
	r, mirror, s := newTestRegistry(t), newTestRegistry(t), newStore(t)
	mirror.push("mirrored/a", small("from the mirror"))
	r.push("library/b", small("b"))
	writeFile(t, s.o.RegistriesConf, `
[[registry]]
location = "example.invalid"
[[registry.mirror]]
location = "`+mirror.host+`/mirrored"
insecure = true
[[registry]]
location = "blocked.invalid"
blocked = true
[[registry]]
prefix = "docker.io"
location = "`+r.host+`"
insecure = true
[aliases]
"nick" = "example.invalid/a"
`)
	if i := mustPull(t, s, "example.invalid/a:1"); i.Tags[0] != "example.invalid/a:1" || content(t, s, i.ID) != "from the mirror" {
		t.Errorf("mirror: %+v", i)
	}
	if i := mustPull(t, s, "nick:1"); i.Tags[0] != "example.invalid/a:1" {
		t.Errorf("alias: %+v", i)
	}
	if _, err := s.Image("nick:1"); err != nil {
		t.Errorf("alias: %v", err)
	}
	if i := mustPull(t, s, "b:1"); i.Tags[0] != "docker.io/library/b:1" {
		t.Errorf("short name: %+v", i)
	}
	if _, err := s.Image("library/b:1"); err != nil {
		t.Errorf("short name: %v", err)
	}
	_, err := s.Pull(t.Context(), "blocked.invalid/a:1", nil)
	if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "blocked by") {
		t.Errorf("blocked: %v", err)
	}
	writeFile(t, s.o.RegistriesConf, "no toml")
	if _, err := s.Pull(t.Context(), r.host+"/a:1", nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("broken: %v", err)
	}
}

func TestPolicy(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	r.push("a", small("a"))
	mustPull(t, s, r.host+"/a:1")
	writeFile(t, s.o.Policy, `{"default":[{"type":"reject"}]}`)
	if _, err := s.Pull(t.Context(), r.host+"/a:1", nil); !errors.Is(err, ErrRejected) || !errdefs.IsPermissionDenied(err) {
		t.Errorf("rejected: %v", err)
	}
	writeFile(t, s.o.Policy, `{`)
	if _, err := s.Pull(t.Context(), r.host+"/a:1", nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("broken: %v", err)
	}
}

// onBlob serves half of the first layer that is asked for, then calls then.
func onBlob(body []byte, then func(w http.ResponseWriter, req *http.Request)) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, req *http.Request) bool {
		if !strings.HasSuffix(req.URL.Path, "/blobs/"+digest.FromBytes(body).String()) {
			return false
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.Write(body[:len(body)/2])
		w.(http.Flusher).Flush()
		then(w, req)
		return true
	}
}

func TestRegistryFailsMidBlob(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	i := large(1, 4)
	r.push("a", i)
	body := gzipped(i.layers[0])
	r.on(onBlob(body, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	_, err := s.Pull(t.Context(), r.host+"/a:1", nil)
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "broke off after") {
		t.Errorf("got %v", err)
	}
	r.on(onBlob(body, func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, len(body)-len(body)/2)) }))
	_, err = s.Pull(t.Context(), r.host+"/a:1", nil)
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "arrived damaged") {
		t.Errorf("corrupt: %v", err)
	}
	if l := leftovers(t, s); l != "" {
		t.Errorf("left behind: %s", l)
	}
	r.on(func(http.ResponseWriter, *http.Request) bool { return false })
	mustPull(t, s, r.host+"/a:1")
}

func TestStall(t *testing.T) {
	r := newTestRegistry(t)
	s := newStore(t, func(o *Options) { o.PullProgressTimeout = 300 * time.Millisecond })
	i := large(1, 1)
	r.push("a", i)
	hang := func(_ http.ResponseWriter, req *http.Request) { <-req.Context().Done() }
	for name, hook := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"in a layer": onBlob(gzipped(i.layers[0]), hang),
		"at once":    func(w http.ResponseWriter, req *http.Request) bool { hang(w, req); return true },
	} {
		r.on(hook)
		_, err := s.Pull(t.Context(), r.host+"/a:1", nil)
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "sends nothing for 300ms") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPullsAreJoined(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	i := large(1, 1)
	r.push("a", i)
	started, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	r.on(func(_ http.ResponseWriter, req *http.Request) bool {
		if strings.Contains(req.URL.Path, "/blobs/") {
			once.Do(func() { close(started); <-goOn })
		}
		return false
	})
	errs := make(chan error, 8)
	for n := range cap(errs) {
		go func() {
			var auth *Auth
			if n%2 == 1 { // another pull, which waits for the first's content
				auth = &Auth{Username: "someone"}
			}
			_, err := s.Pull(t.Context(), r.host+"/a:1", auth)
			errs <- err
		}()
	}
	<-started
	for waiting(s) < cap(errs) {
		time.Sleep(time.Millisecond) // until all have come: nothing tells of it
	}
	close(goOn)
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if n := r.blobs.Load(); n != 2 {
		t.Errorf("%d blobs were asked for", n)
	}
}

func waiting(s *Store) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, f := range s.flights {
		n += f.waiting
	}
	return n
}

func TestCancel(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	i := large(1, 1)
	r.push("a", i)
	hanging, gone := make(chan struct{}), make(chan struct{})
	r.on(onBlob(gzipped(i.layers[0]), func(_ http.ResponseWriter, req *http.Request) {
		close(hanging)
		<-req.Context().Done()
		close(gone)
	}))
	ctx, cancel := context.WithCancel(t.Context())
	patient, stop := context.WithCancel(t.Context())
	errs := make(chan error, 2)
	for _, c := range []context.Context{ctx, patient} {
		go func() {
			_, err := s.Pull(c, r.host+"/a:1", nil)
			errs <- err
		}()
	}
	<-hanging
	for waiting(s) < 2 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	select {
	case <-gone:
		t.Error("the pull ended for one who still waits")
	case <-time.After(50 * time.Millisecond):
	}
	stop()
	<-gone
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestFullDisk(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=12m"); err != nil {
		t.Fatal(err)
	}
	r := newTestRegistry(t)
	s := newStore(t, func(o *Options) { o.Root = filepath.Join(disk, "images") })
	t.Cleanup(func() {
		s.Close()
		if err := unix.Unmount(disk, 0); err != nil {
			t.Error(err)
		}
	})
	r.push("large", large(1, 40))
	zeroes := torture.NewTar()
	zeroes.File("compresses", strings.Repeat("not only zeros, but much the same\n", 1<<19))
	r.push("unpacks", testImage{layers: [][]byte{zeroes.Bytes()}})
	for _, repo := range []string{"large", "unpacks"} {
		_, err := s.Pull(t.Context(), r.host+"/"+repo+":1", nil)
		if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), s.o.Root) || !strings.Contains(err.Error(), "remove images") {
			t.Errorf("%s: %v", repo, err)
		}
	}
	if l := leftovers(t, s); l != "" {
		t.Errorf("left behind: %s", l)
	}
	r.push("small", small("x"))
	mustPull(t, s, r.host+"/small:1")
}
