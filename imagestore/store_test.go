package imagestore

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// reopen opens the root of a store again, as after a restart.
func reopen(t *testing.T, s *Store) *Store {
	t.Helper()
	s.Close()
	next, err := Open(s.o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(next.Close)
	return next
}

func TestTagsMove(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	r.push("a", small("old"))
	old := mustPull(t, s, r.host+"/a:1")
	r.push("a", small("new"))
	moved := mustPull(t, s, r.host+"/a:1")
	for range 2 {
		i, err := s.Image(old.ID)
		if err != nil || len(i.Tags) != 0 || len(i.Digests) != 1 {
			t.Errorf("old image: %+v, %v", i, err)
		}
		if i, err := s.Image(r.host + "/a:1"); err != nil || i.ID != moved.ID {
			t.Errorf("tag: %+v, %v", i, err)
		}
		if n := len(s.Images()); n != 2 {
			t.Errorf("%d images", n)
		}
		s = reopen(t, s)
	}
}

func TestSecondPullFetchesNoBlob(t *testing.T) {
	r := newTestRegistry(t)
	var results []PullResult
	s := newStore(t, func(o *Options) { o.Pulled = func(p PullResult) { results = append(results, p) } })
	r.push("a", small("x"))
	mustPull(t, s, r.host+"/a:1")
	before := r.blobs.Load()
	mustPull(t, s, r.host+"/a:1")
	if n := r.blobs.Load() - before; n != 0 {
		t.Errorf("%d blobs were fetched again", n)
	}
	if _, err := s.Pull(t.Context(), r.host+"/none:1", nil); err == nil {
		t.Error("pulled what is not there")
	}
	if len(results) != 3 || results[0].Cached || results[0].Downloaded == 0 || results[0].Unpacked == 0 || !results[1].Cached || results[2].Err == nil {
		t.Errorf("results %+v", results)
	}
}

func TestRemove(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	r.push("a", small("x"))
	i := mustPull(t, s, r.host+"/a:1")
	r.push("b", small("x"))
	mustPull(t, s, r.host+"/b:1") // the same image by another name
	lease := filepath.Join(filepath.Dir(s.o.Root), "lease")
	for range 2 { // idempotent
		if got, err := s.Link(i.ID, lease); err != nil || got.ID != i.ID {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	if err := s.Remove(t.Context(), r.host+"/b:1"); err != nil {
		t.Fatal(err)
	}
	if l := leftovers(t, s); l != "" || len(s.Images()) != 0 {
		t.Errorf("left: %s, %v", l, s.Images())
	}
	var st unix.Stat_t
	if err := unix.Stat(lease, &st); err != nil || st.Nlink != 1 || st.Blocks == 0 {
		t.Errorf("lease: %+v, %v", st, err)
	}
	for _, ref := range []string{r.host + "/b:1", i.ID, "never-was"} {
		if err := s.Remove(t.Context(), ref); err != nil {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if _, err := s.Image(i.ID); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
}

func TestLinkRefused(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	r.push("a", small("x"))
	i := mustPull(t, s, r.host+"/a:1")
	taken := filepath.Join(t.TempDir(), "taken")
	writeFile(t, taken, "x")
	if _, err := s.Link(i.ID, taken); !errdefs.IsAlreadyExists(err) {
		t.Errorf("taken: %v", err)
	}
	if _, err := s.Link(digest.FromString("x").String(), taken+"2"); !errdefs.IsNotFound(err) {
		t.Errorf("unknown image: %v", err)
	}
	if _, err := s.Link(i.ID, "/dev/shm/caisson-link-test"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("other file system: %v", err)
	}
}

func TestPinned(t *testing.T) {
	r := newTestRegistry(t)
	r.push("pause", small("pause"))
	r.push("other", small("other"))
	s := newStore(t, func(o *Options) { o.Pinned = []string{r.host + "/pause:1"} })
	if !mustPull(t, s, r.host+"/pause:1").Pinned || mustPull(t, s, r.host+"/other:1").Pinned {
		t.Error("the wrong image is pinned")
	}
}

func TestUsageIsTrueToTheDisk(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	empty, err := s.Usage()
	if err != nil {
		t.Fatal(err)
	}
	r.push("a", large(1, 3))
	i := mustPull(t, s, r.host+"/a:1")
	full, err := s.Usage()
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(s.imagePath(digest.Digest(i.ID)), &st); err != nil {
		t.Fatal(err)
	}
	if grown := int64(full.Bytes - empty.Bytes); i.Size != st.Blocks*512 || grown < i.Size || grown > i.Size+64<<10 || full.Inodes <= empty.Inodes {
		t.Errorf("usage %+v, before %+v, image of %d", full, empty, i.Size)
	}
	if i.Size >= st.Size || i.Size < 3<<20 {
		t.Errorf("image takes %d of %d bytes", i.Size, st.Size)
	}
}

func TestCrashLeavesNothing(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	r.push("a", small("x"))
	r.push("b", small("y"))
	kept, cut := mustPull(t, s, r.host+"/a:1"), mustPull(t, s, r.host+"/b:1")
	hex := strings.Repeat("ab", 32)
	writeFile(t, filepath.Join(s.staging, "image-123"), "half written")
	writeFile(t, filepath.Join(s.o.Root, hex+".erofs"), "in its place, but without a record")
	writeFile(t, filepath.Join(s.o.Root, "."+hex+".json.77"), "{")
	if err := os.Chmod(s.imagePath(digest.Digest(cut.ID)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(s.imagePath(digest.Digest(cut.ID)), 4096); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	if all := s.Images(); len(all) != 1 || all[0].ID != kept.ID {
		t.Errorf("images %+v", all)
	}
	if l := leftovers(t, s); l != "" {
		t.Errorf("left: %s", l)
	}
}

func TestRecordNotUnderstoodStays(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	r.push("a", small("x"))
	id := digest.Digest(mustPull(t, s, r.host+"/a:1").ID)
	data, err := os.ReadFile(s.recordPath(id))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func([]byte) []byte{
		"later version": func(b []byte) []byte { return bytes.Replace(b, []byte(`"Version": 1`), []byte(`"Version": 2`), 1) },
		"no json":       func(b []byte) []byte { return b[:len(b)/2] },
		"other image": func(b []byte) []byte {
			return bytes.ReplaceAll(b, []byte(id.Encoded()), []byte(strings.Repeat("0", 64)))
		},
	} {
		writeFile(t, s.recordPath(id), string(change(data)))
		s = reopen(t, s)
		if len(s.Images()) != 0 {
			t.Errorf("%s: listed", name)
		}
		if _, err := os.Stat(s.imagePath(id)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	writeFile(t, s.recordPath(id), string(data))
	if s = reopen(t, s); len(s.Images()) != 1 {
		t.Error("the record is not read again")
	}
}

func TestTwoRecordsClaimATag(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	r.push("a", small("x"))
	r.push("b", small("y"))
	first, second := mustPull(t, s, r.host+"/a:1"), mustPull(t, s, r.host+"/b:1")
	later := *s.images[digest.Digest(second.ID)]
	later.Tags = map[string]time.Time{r.host + "/a:1": time.Now()}
	if err := s.writeRecord(&later); err != nil { // as if the daemon had died before it took the tag from the first
		t.Fatal(err)
	}
	s = reopen(t, s)
	if i, err := s.Image(r.host + "/a:1"); err != nil || i.ID != second.ID {
		t.Errorf("%+v, %v", i, err)
	}
	if i, err := s.Image(first.ID); err != nil || len(i.Tags) != 0 {
		t.Errorf("%+v, %v", i, err)
	}
}

func TestOneProcessPerRoot(t *testing.T) {
	s := newStore(t)
	if _, err := Open(s.o); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v", err)
	}
}

func TestPrefixes(t *testing.T) {
	s := newStore(t)
	a, b := digest.Digest("sha256:aa"+strings.Repeat("0", 62)), digest.Digest("sha256:ab"+strings.Repeat("0", 62))
	for _, id := range []digest.Digest{a, b} {
		s.images[id] = &record{ID: id, Config: []byte("{}")}
		writeFile(t, s.imagePath(id), "x")
	}
	for ref, want := range map[string]func(error) bool{
		"a": errdefs.IsInvalidArgument, "sha256:a": errdefs.IsInvalidArgument, "c": errdefs.IsNotFound,
		"aa": func(err error) bool { return err == nil }, string(b): func(err error) bool { return err == nil },
	} {
		if _, err := s.Image(ref); !want(err) {
			t.Errorf("%s: %v", ref, err)
		}
	}
}

func TestNoSpace(t *testing.T) {
	for _, err := range []error{syscall.ENOSPC, syscall.EDQUOT, &os.PathError{Err: syscall.ENOSPC}} {
		if !noSpace(err) {
			t.Errorf("%v", err)
		}
	}
	if noSpace(errors.New("no space")) {
		t.Error("by its text alone")
	}
}

func TestRecordSurvives(t *testing.T) {
	s := newStore(t)
	config := []byte(`{"os":"linux"}`)
	want := &record{Version: recordVersion, ID: digest.FromBytes(config), Tags: map[string]time.Time{"a:1": time.Unix(5, 6).UTC()},
		Digests: []string{"a@x"}, Length: 7, Config: config, Pulled: time.Unix(8, 9).UTC()}
	if err := s.writeRecord(want); err != nil {
		t.Fatal(err)
	}
	got, err := s.readRecord(s.recordPath(want.ID))
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != want.ID || !got.Tags["a:1"].Equal(want.Tags["a:1"]) || !slices.Equal(got.Digests, want.Digests) ||
		got.Length != want.Length || !bytes.Equal(got.Config, want.Config) || !got.Pulled.Equal(want.Pulled) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// TestRecordOfImageFails: of a pull whose record can't be written, as on a disk that is full by now, nothing is
// left.
func TestRecordOfImageFails(t *testing.T) {
	r, s := newTestRegistry(t), newStore(t)
	r.push("a", small("x"))
	got := mustPull(t, s, r.host+"/a:1")
	if err := s.Remove(t.Context(), got.ID); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(s.recordPath(digest.Digest(got.ID)), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pull(t.Context(), r.host+"/a:1", nil); err == nil {
		t.Fatal("the image was pulled, and has no record")
	}
	if left := leftovers(t, s); left != "" || len(s.Images()) > 0 {
		t.Errorf("there are %d images, and %s", len(s.Images()), left)
	}
}
