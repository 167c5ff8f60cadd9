package e2e

import (
	"archive/tar"
	"fmt"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func testImages(t *testing.T, d *harness.Daemon) {
	ctx, service := t.Context(), d.ImageService()
	// A short name, the full one, and a digest lead to one image.
	id := d.Pull(images.Busybox)
	if short := d.Pull("busybox:1.35"); short != id {
		t.Errorf("a short name leads to %s, want %s", short, id)
	}
	r, err := service.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: id}, Verbose: true})
	if err != nil || r.Image == nil {
		t.Fatalf("status by id: %v, %v", r, err)
	}
	if len(r.Image.RepoDigests) == 0 || r.Image.Size == 0 || len(r.Info) == 0 {
		t.Errorf("got %v", r)
	}
	if by := d.Pull(r.Image.RepoDigests[0]); by != id {
		t.Errorf("the digest leads to %s, want %s", by, id)
	}
	fs, err := service.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil || len(fs.ImageFilesystems) == 0 || fs.ImageFilesystems[0].UsedBytes.Value == 0 {
		t.Errorf("got %v, %v", fs, err)
	}
	if len(fs.ContainerFilesystems) != 1 || fs.ContainerFilesystems[0].FsId.Mountpoint != fs.ImageFilesystems[0].FsId.Mountpoint {
		t.Errorf("containers: %v", fs.ContainerFilesystems)
	}
	auth := &runtimeapi.AuthConfig{Username: harness.User, Password: harness.Password}
	private := d.Registries.PrivateImage()
	if _, err := d.TryPull(private, auth); err != nil {
		t.Fatalf("with the right password: %v", err)
	}
	// An image in use can be removed; its containers go on, and its pod takes it when it is pulled again.
	pod := d.RunPod()
	c, err := pod.TryCreate(private, sleeper)
	if err != nil {
		t.Fatal(err)
	}
	c.Start()
	if _, err := service.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: private}}); err != nil {
		t.Errorf("remove an image in use: %v", err)
	}
	if out := c.Exec("cat", "/private"); out != "secret\n" {
		t.Errorf("got %q", out)
	}
	if _, err := d.TryPull(private, auth); err != nil {
		t.Fatal(err)
	}
	if c, err = pod.TryCreate(private, sleeper); err != nil {
		t.Fatalf("after another pull: %v", err)
	}
	c.Start()
	if out := c.Exec("cat", "/private"); out != "secret\n" {
		t.Errorf("after another pull: got %q", out)
	}
}

// testTortureImage compares what a container sees with what the layers say, entry by entry.
func testTortureImage(t *testing.T, d *harness.Daemon) {
	c := d.RunPod().Run(images.Torture, sleeper)
	out := c.Exec("sh", "-c", "cd / && find "+images.TortureDir+" -exec stat -c '%n|%f|%u|%g|%s|%Y|%h' {} +")
	got := map[string][]string{}
	for l := range strings.Lines(out) {
		name, rest, _ := strings.Cut(strings.TrimSuffix(l, "\n"), "|")
		got[name] = strings.Split(rest, "|")
	}
	want := images.TortureFiles()
	links := map[string]int{}
	for _, e := range want {
		links[e.Name]++
	}
	for name, e := range want {
		have, ok := got[name]
		if !ok {
			t.Errorf("%s is missing", name)
			continue
		}
		delete(got, name)
		fields := []string{fmt.Sprintf("%x", mode(e.Header)), fmt.Sprint(e.Uid), fmt.Sprint(e.Gid), fmt.Sprint(e.Size), fmt.Sprint(e.ModTime.Unix()), fmt.Sprint(links[e.Name])}
		switch e.Typeflag {
		case tar.TypeDir:
			have[3], have[5], fields[3], fields[5] = "", "", "", "" // a directory's size and links are the file system's
		case tar.TypeSymlink:
			fields[3] = fmt.Sprint(len(e.Linkname))
		}
		if strings.Join(have, "|") != strings.Join(fields, "|") {
			t.Errorf("%s: got %v, want %v", name, have, fields)
		}
	}
	for name := range got {
		t.Errorf("%s should not be there", name)
	}
	const sums = "find " + images.TortureDir + " -type f -exec cat {} + | wc -c"
	var size int64
	for _, e := range want {
		if e.Typeflag == tar.TypeReg {
			size += e.Size
		}
	}
	if out := strings.TrimSpace(c.Exec("sh", "-c", sums)); out != fmt.Sprint(size) {
		t.Errorf("files have %s bytes, want %d", out, size)
	}
}

// mode is what stat(2) has as st_mode of an entry.
func mode(h tar.Header) int64 {
	kinds := map[byte]int64{tar.TypeReg: 0o100000, tar.TypeDir: 0o040000, tar.TypeSymlink: 0o120000, tar.TypeChar: 0o020000, tar.TypeFifo: 0o010000}
	return kinds[h.Typeflag] | h.Mode
}
