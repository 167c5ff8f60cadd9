package guest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func files(name string, list ...*agent.File) *agent.Files {
	return &agent.Files{Name: name, Files: list}
}

// configMap is a volume as the kubelet lays it out.
func configMap(version, value string) []*agent.File {
	return []*agent.File{
		{Path: "..data", Mode: unix.S_IFLNK | 0o777, Target: "..v" + version},
		{Path: "key", Mode: unix.S_IFLNK | 0o777, Target: "..data/key"},
		{Path: "..v" + version, Mode: unix.S_IFDIR | 0o755},
		{Path: "..v" + version + "/key", Mode: unix.S_IFREG | 0o640, Gid: 1001, Content: []byte(value)},
	}
}

func TestMounts(t *testing.T) {
	ctx, c := startAgent(t)
	termination := files("termination", &agent.File{Mode: 0o666})
	termination.Single, termination.Writeback = true, true
	mounts := []*agent.Mount{
		{Destination: "/config", Options: []string{"ro"}, Source: &agent.Mount_Files{Files: files("config", configMap("1", "one")...)}},
		{Destination: "/dev/termination-log", Source: &agent.Mount_Files{Files: termination}},
		{Destination: "/cache", Source: &agent.Mount_EmptyDir{EmptyDir: &agent.EmptyDir{Name: "cache"}}},
		{Destination: "/memory", Source: &agent.Mount_EmptyDir{EmptyDir: &agent.EmptyDir{Name: "memory", Memory: true, Size: 1 << 20, Gid: 1001, Mode: 0o2770}}},
		{Destination: "/sub", Source: &agent.Mount_EmptyDir{EmptyDir: &agent.EmptyDir{Name: "cache", SubPath: "a/b"}}},
		{Destination: "/image", Source: &agent.Mount_Disk{Disk: &agent.DiskMount{Addr: testImage, SubPath: "etc"}}, Options: []string{"ro"}},
	}
	r, _ := create(t, ctx, c, "one", specOf("sleep", "1000"), &agent.CreateRequest{Mounts: mounts})
	r.start()
	ls := func(args ...string) string {
		t.Helper()
		code, out, errs := r.exec(nil, args...)
		if code != 0 {
			t.Errorf("%v: %d, %s", args, code, errs)
		}
		return out
	}
	if out := ls("sh", "-c", "cat /config/key; stat -c %a:%g /config/..data/key; stat -c %a:%g /memory; ls /image; touch /sub/x; ls /cache/a/b"); out != "one640:1001\n2770:1001\ngroup\npasswd\nx\n" {
		t.Errorf("got %q", out)
	}
	if code, _, errs := r.exec(nil, "touch", "/config/x"); code == 0 || !strings.Contains(errs, "Read-only") {
		t.Errorf("a read-only mount: %d, %q", code, errs)
	}
	if code, _, errs := r.exec(nil, "dd", "if=/dev/zero", "of=/memory/x", "bs=1M", "count=2"); code == 0 || !strings.Contains(errs, "No space") {
		t.Errorf("a full memory volume: %d, %q", code, errs)
	}
	update := &agent.FilesRequest{Files: files("config", configMap("2", "two")...)}
	if _, err := service1(t, ctx, c).Files(ctx, update); err != nil {
		t.Fatal(err)
	}
	if out := ls("sh", "-c", "cat /config/key; ls -A /config"); out != "two..data\n..v2\nkey\n" {
		t.Errorf("after an update: %q", out)
	}
	if _, err := service1(t, ctx, c).Files(ctx, &agent.FilesRequest{Files: files("nope")}); !errdefs.IsNotFound(err) {
		t.Errorf("unknown files: %v", err)
	}
	if _, err := service1(t, ctx, c).Detach(ctx, &agent.DetachRequest{Addr: testImage}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("detach what is in use: %v", err)
	}
	ls("sh", "-c", "echo -n why >/dev/termination-log")
	if _, err := service1(t, ctx, c).Signal(ctx, &agent.SignalRequest{Id: "one", Signal: 9}); err != nil {
		t.Fatal(err)
	}
	if s := r.wait(); len(s.Files) != 1 || s.Files[0].Name != "termination" || string(s.Files[0].Content) != "why" {
		t.Errorf("got %v", s)
	}
	r.remove()
	// What is the pod's outlives its container.
	r, _ = create(t, ctx, c, "two", specOf("sh", "-c", "ls /cache/a/b; cat /config/key"), &agent.CreateRequest{Mounts: []*agent.Mount{
		{Destination: "/cache", Source: &agent.Mount_EmptyDir{EmptyDir: &agent.EmptyDir{Name: "cache"}}},
		{Destination: "/config", Source: &agent.Mount_Files{Files: files("config")}},
	}})
	r.start()
	if out, errs := r.logs(); out != "x\ntwo\n" && out != "x\ntwo" || errs != "" {
		t.Errorf("got %q, %q", out, errs)
	}
	r.remove()
}

// TestMountOrder: what is mounted below another place is seen there, in whatever order they are asked for.
func TestMountOrder(t *testing.T) {
	ctx, c := startAgent(t)
	emptyDir := func(at, name string) *agent.Mount {
		return &agent.Mount{Destination: at, Source: &agent.Mount_EmptyDir{EmptyDir: &agent.EmptyDir{Name: name}}}
	}
	r, _ := create(t, ctx, c, "one", specOf("sh", "-c", "cat /data/certs/key; ls -A /etc"), &agent.CreateRequest{Mounts: []*agent.Mount{
		{Destination: "/data/certs/", Source: &agent.Mount_Files{Files: files("certs", configMap("1", "one")...)}},
		emptyDir("/data", "data"), emptyDir("/etc", "etc"),
	}})
	r.start()
	if out, errs := r.logs(); out != "one\nhostname\nresolv.conf\n" && out != "onehostname\nresolv.conf\n" {
		t.Errorf("got %q, %q", out, errs)
	}
	r.remove()
}

func TestSubPathStaysInside(t *testing.T) {
	ctx, c := startAgent(t)
	mount := func(sub string) *agent.CreateRequest {
		return &agent.CreateRequest{Mounts: []*agent.Mount{{Destination: "/v", Source: &agent.Mount_EmptyDir{EmptyDir: &agent.EmptyDir{Name: "v", SubPath: sub}}}}}
	}
	r, _ := create(t, ctx, c, "one", specOf("sh", "-c", "busybox ln -s / /v/root; busybox ln -s ../../../.. /v/up"), mount(""))
	r.start().wait()
	r.remove()
	for _, sub := range []string{"../x", "/x", "root/etc", "up/up/etc"} {
		r, _, err := tryCreate(t, ctx, c, "two", specOf("ls", "-A", "/v"), mount(sub))
		if err != nil {
			continue
		}
		r.start()
		if out, _ := r.logs(); strings.Contains(out, "passwd") {
			t.Errorf("%q led to %q", sub, out)
		}
		r.remove()
	}
}

func TestSyncTree(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("safe"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "trap")); err != nil {
		t.Fatal(err)
	}
	list := []*agent.File{
		{Path: "trap", Mode: 0o600, Content: []byte("mine")},
		{Path: "deep/er/file", Mode: unix.S_IFREG | 0o400, Content: []byte("x")},
		{Path: "empty", Mode: unix.S_IFDIR | 0o700},
		{Path: ".", Mode: unix.S_IFDIR | 0o755},
	}
	if err := newPieces().sync(dir, list, false); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(outside); string(b) != "safe" {
		t.Errorf("wrote through a link: %q, %v", b, err)
	}
	names := func() []string {
		var all []string
		filepath.WalkDir(dir, func(p string, _ os.DirEntry, _ error) error {
			name, _ := filepath.Rel(dir, p)
			all = append(all, name)
			return nil
		})
		return all
	}
	if got := names(); !slices.Equal(got, []string{".", "deep", "deep/er", "deep/er/file", "empty", "trap"}) {
		t.Errorf("got %q", got)
	}
	// A file where a folder was, and the reverse; the rest goes.
	if err := newPieces().sync(dir, []*agent.File{{Path: "deep", Mode: 0o644}, {Path: "trap/in", Mode: 0o644}, {Path: "trap", Mode: unix.S_IFDIR | 0o755}}, false); err != nil {
		t.Fatal(err)
	}
	if got := names(); !slices.Equal(got, []string{".", "deep", "trap", "trap/in"}) {
		t.Errorf("got %q", got)
	}
	for _, path := range []string{"../x", "/x", "a/../../x", "a//b"} {
		if err := newPieces().sync(dir, []*agent.File{{Path: path, Mode: 0o644}}, false); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", path, err)
		}
	}
	if err := newPieces().sync(dir, []*agent.File{{Path: "dev", Mode: unix.S_IFBLK | 0o644}}, false); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a device: %v", err)
	}
}

// TestWriteback: a file goes back when a container wrote it, and only then.
func TestWriteback(t *testing.T) {
	ctx, c := startAgent(t)
	hosts := func(content string) *agent.CreateRequest {
		f := files("hosts", &agent.File{Mode: 0o644, Content: []byte(content)})
		f.Single, f.Writeback = true, true
		return &agent.CreateRequest{Mounts: []*agent.Mount{{Destination: "/hosts", Source: &agent.Mount_Files{Files: f}}}}
	}
	run := func(id, command, host, want string) []*agent.WrittenFile {
		t.Helper()
		r, _ := create(t, ctx, c, id, specOf("sh", "-c", command), hosts(host))
		r.start()
		s := r.wait()
		if out, _ := r.logs(); out != want {
			t.Errorf("%s: the container read %q, want %q", id, out, want)
		}
		return s.Files
	}
	if got := run("reads", "cat /hosts", "one\n", "one\n"); len(got) > 0 {
		t.Errorf("what was only read came back: %v", got)
	}
	if got := run("fresh", "cat /hosts", "two, by the node\n", "two, by the node\n"); len(got) > 0 {
		t.Errorf("what the node wrote came back: %v", got)
	}
	first, _ := create(t, ctx, c, "writes", specOf("sleep", "1000"), hosts("two, by the node\n"))
	first.start()
	if code, _, errs := first.exec(nil, "sh", "-c", "echo three >/hosts"); code != 0 {
		t.Fatal(errs)
	}
	if got := run("second", "cat /hosts", "two, by the node\n", "three\n"); len(got) != 1 || string(got[0].Content) != "three\n" {
		t.Errorf("what a container wrote did not come back at the pod's next exit: %v", got)
	}
	if got := run("none", "cat /hosts", "three\n", "three\n"); len(got) > 0 {
		t.Errorf("what came back already came again: %v", got)
	}
	if got := run("empties", ": >/hosts", "three\n", ""); len(got) != 1 || len(got[0].Content) != 0 {
		t.Errorf("an emptied file: %v", got)
	}
	if got := run("grows", "dd if=/dev/zero of=/hosts bs=1M count=2 2>/dev/null", "", ""); len(got) != 1 || len(got[0].Content) != agent.WrittenMax+1 {
		t.Errorf("a file that grew too long is not told: %d files", len(got))
	}
}
