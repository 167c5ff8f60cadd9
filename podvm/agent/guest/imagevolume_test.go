package guest

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
)

// TestImageVolumes: each container has its own copy of what the image has there, and may write to it.
func TestImageVolumes(t *testing.T) {
	ctx, c := startAgent(t)
	const script = "cat /etc/group | grep -c wheel; echo x >/etc/new; echo x >/made/new; echo x >/root-is-ro; ls -A /etc /made"
	for _, id := range []string{"one", "two"} {
		r, _ := create(t, ctx, c, id, specOf("sh", "-c", script), &agent.CreateRequest{
			Rootfs: &agent.Rootfs{ImageAddr: testImage, Readonly: true}, Volumes: []string{"/etc", "/made"},
		})
		r.start()
		const want = "1\n/etc:\ngroup\nhostname\nnew\npasswd\nresolv.conf\n\n/made:\nnew\n"
		if out, errs := r.logs(); out != want || errs == "" {
			t.Errorf("%s: got %q, %q", id, out, errs)
		}
		r.remove()
	}
	_, _, err := tryCreate(t, ctx, c, "file", specOf("true"), &agent.CreateRequest{Volumes: []string{"/etc/passwd"}})
	if !errdefs.IsInvalidArgument(err) {
		t.Errorf("a file as a volume: %v", err)
	}
}

// TestFillVolume: a copy has owners, modes and links as the image has them, and nothing from outside of it.
func TestFillVolume(t *testing.T) {
	image, volume := t.TempDir(), filepath.Join(t.TempDir(), "volumes", "0")
	data := filepath.Join(image, "srv", "data")
	step := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	step(os.MkdirAll(filepath.Join(data, "deep"), 0o755))
	step(os.WriteFile(filepath.Join(data, "deep", "file"), []byte("x"), 0o640))
	step(os.Chown(filepath.Join(data, "deep", "file"), 1000, 1001))
	step(os.Link(filepath.Join(data, "deep", "file"), filepath.Join(data, "twin")))
	step(os.Symlink("/etc/shadow", filepath.Join(data, "link")))
	step(os.Chown(data, 1000, 1001))
	step(os.Chmod(data, os.ModeSetgid|0o750))
	step(os.Symlink("/srv/../../srv", filepath.Join(image, "way")))
	step(fillVolume(volume, image, "/way/data"))

	for name, mode := range map[string]os.FileMode{".": os.ModeDir | os.ModeSetgid | 0o750, "deep/file": 0o640, "link": os.ModeSymlink | 0o777} {
		info, err := os.Lstat(filepath.Join(volume, name))
		step(err)
		st := info.Sys().(*syscall.Stat_t)
		if info.Mode() != mode || name != "link" && (st.Uid != 1000 || st.Gid != 1001) {
			t.Errorf("%s: %v of %d:%d", name, info.Mode(), st.Uid, st.Gid)
		}
	}
	if to, err := os.Readlink(filepath.Join(volume, "link")); to != "/etc/shadow" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	one, err := os.Stat(filepath.Join(volume, "deep", "file"))
	step(err)
	if two, err := os.Stat(filepath.Join(volume, "twin")); err != nil || !os.SameFile(one, two) {
		t.Errorf("names of one file are two files: %v", err)
	}
}
