package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/imagestore"
)

func TestImages(t *testing.T) {
	d := start(t)
	ctx, c := t.Context(), cri.NewImageServiceClient(d.conn)
	spec := &cri.ImageSpec{Image: "docker.io/library/busybox:1", RuntimeHandler: "caisson"}
	if ref := must(c.PullImage(ctx, &cri.PullImageRequest{Image: spec}))(t).GetImageRef(); ref != busyboxID {
		t.Errorf("pulled %q", ref)
	}
	r := must(c.ImageStatus(ctx, &cri.ImageStatusRequest{Image: spec, Verbose: true}))(t)
	i := r.GetImage()
	if i.GetId() != busyboxID || i.GetUid().GetValue() != 1000 || i.GetUsername() != "" || !i.GetPinned() || i.GetSize() != 4096 || len(i.GetRepoDigests()) != 1 {
		t.Errorf("image: %v", i)
	}
	if info := r.GetInfo()["info"]; !strings.Contains(info, `"StopSignal":"SIGQUIT"`) || !strings.Contains(info, `"created_by":"me"`) || !strings.Contains(info, `"pulled":`) {
		t.Errorf("info: %v", r.GetInfo())
	}
	for ref, want := range map[string]int{"": 1, busyboxID: 1, "absent": 0} {
		f := &cri.ImageFilter{Image: &cri.ImageSpec{Image: ref}}
		if got := must(c.ListImages(ctx, &cri.ListImagesRequest{Filter: f}))(t).GetImages(); len(got) != want {
			t.Errorf("list %q: %v", ref, got)
		}
	}
	for range 2 {
		must(c.RemoveImage(ctx, &cri.RemoveImageRequest{Image: spec}))(t)
	}
	if i := must(c.ImageStatus(ctx, &cri.ImageStatusRequest{Image: spec}))(t).GetImage(); i != nil {
		t.Errorf("removed, and still there: %v", i)
	}
	_, err := c.PullImage(ctx, &cri.PullImageRequest{})
	wantCode(t, err, codes.InvalidArgument)
	_, err = c.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: "a", RuntimeHandler: "runsc"}})
	wantCode(t, err, codes.InvalidArgument)
}

// TestPullErrors: the kubelet tells these apart by how an error without a code begins.
func TestPullErrors(t *testing.T) {
	d := start(t)
	c := cri.NewImageServiceClient(d.conn)
	for prefix, err := range map[string]error{
		"RegistryUnavailable: ":       fmt.Errorf("registry r: connection refused: %w", errdefs.ErrUnavailable),
		"SignatureValidationFailed: ": fmt.Errorf("image r/a: %w", imagestore.ErrRejected),
	} {
		d.images.err = err
		_, got := c.PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: "a"}})
		wantCode(t, got, codes.Unknown)
		if m := status.Convert(got).Message(); m != prefix+err.Error() {
			t.Errorf("got %q", m)
		}
	}
}

func TestImageFsInfo(t *testing.T) {
	var root string
	d := start(t, func(o *Options) { root = o.Root })
	block := make([]byte, 64<<10)
	for i := range block {
		block[i] = byte(i)
	}
	disk := filepath.Join(root, "pod", "scratch.img")
	if err := os.Mkdir(filepath.Dir(disk), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(disk, block, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 1<<40); err != nil { // sparse: costs nothing
		t.Fatal(err)
	}
	image := filepath.Join(t.TempDir(), "image.erofs")
	if err := os.WriteFile(image, block, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(image, filepath.Join(root, "pod", "lease.erofs")); err != nil { // counted in the store
		t.Fatal(err)
	}
	gone := filepath.Join(root, "pod", "gone.erofs") // no longer in the store: an image still, and one for two pods
	if err := errors.Join(os.WriteFile(gone, block[:8<<10], 0o600), os.Mkdir(filepath.Join(root, "other"), 0o700), os.Link(gone, filepath.Join(root, "other", "gone.erofs"))); err != nil {
		t.Fatal(err)
	}
	r := must(cri.NewImageServiceClient(d.conn).ImageFsInfo(t.Context(), &cri.ImageFsInfoRequest{}))(t)
	images, pods := r.GetImageFilesystems()[0], r.GetContainerFilesystems()[0]
	if images.GetFsId().GetMountpoint() != "/images" || images.GetUsedBytes().GetValue() != 4096+(8<<10) || images.GetInodesUsed().GetValue() != 3 || images.GetTimestamp() == 0 {
		t.Errorf("images: %v", images)
	}
	used := pods.GetUsedBytes().GetValue()
	if pods.GetFsId().GetMountpoint() != "/images" || used < 64<<10 || used > 100<<10 || pods.GetInodesUsed().GetValue() != 4 {
		t.Errorf("pods: %v", pods)
	}
	if _, _, err := podUsage(filepath.Join(root, "absent")); err != nil {
		t.Errorf("a folder that is missing: %v", err)
	}
}
