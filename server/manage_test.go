package server

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/imagestore"
	"github.com/caisson-vm/caisson/network"
	"github.com/caisson-vm/caisson/podvm"
	"github.com/caisson-vm/caisson/podvm/share"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// noVMs is a driver on a node where no VM starts.
type noVMs struct{}

func (noVMs) Launch(context.Context, vmm.Config) (vmm.VM, error) {
	return nil, errors.New("no VM today")
}
func (noVMs) Attach(context.Context, vmm.Config) (vmm.VM, error) { return nil, vmm.ErrGone }
func (noVMs) Name() string                                       { return "none" }

// noNetwork connects nothing.
type noNetwork struct{}

func (noNetwork) Open(string) (*os.File, error) { return os.Open(os.DevNull) }
func (noNetwork) Setup(context.Context, network.Pod) (*network.Attachment, error) {
	return &network.Attachment{}, nil
}
func (noNetwork) Teardown(context.Context, network.Pod) error { return nil }
func (noNetwork) OpenTap(*network.Attachment, int) (*os.File, error) {
	return nil, errors.New("no tap today")
}
func (noNetwork) GC(context.Context, []string) error { return nil }

// TestManage: the real Manager and the real store behind the server, on a node where no VM starts.
func TestManage(t *testing.T) {
	root, state := t.TempDir(), shortDir(t)
	store, err := imagestore.Open(imagestore.Options{Root: filepath.Join(root, "images")})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	scratch, err := podvm.NewScratch(root, 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	m, err := podvm.New(podvm.Options{
		Root: root, State: state, Driver: noVMs{}, Drivers: map[string]vmm.Driver{"none": noVMs{}}, Network: noNetwork{}, Images: store, Shares: share.New("false"),
		Size: vmm.Size{CPUs: 1, Memory: 128 << 20}, Max: vmm.Size{CPUs: 1, Memory: 128 << 20}, Scratch: scratch,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	d := start(t, func(o *Options) { o.Pods, o.Images = Manage(m), store })
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)

	_, err = c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: fullPod()})
	if err == nil || !strings.Contains(err.Error(), "no VM today") {
		t.Errorf("the cause is not in the error: %v", err)
	}
	if pods := must(c.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{}))(t).GetItems(); len(pods) != 0 {
		t.Errorf("left: %v", pods)
	}
	_, err = c.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: "feed"})
	wantCode(t, err, codes.NotFound)
	_, err = c.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: "feed"})
	wantCode(t, err, codes.NotFound)
	for _, err := range []error{
		second(c.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: "feed"})),
		second(c.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: "feed"})),
		second(c.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: "feed"})),
		second(c.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: "feed"})),
	} {
		if err != nil {
			t.Errorf("what is gone: %v", err)
		}
	}
	watch, stop := context.WithCancel(ctx)
	events := must(c.GetContainerEvents(watch, &cri.GetEventsRequest{}))(t)
	stop()
	_, err = events.Recv()
	wantCode(t, err, codes.Canceled)

	images := cri.NewImageServiceClient(d.conn)
	if got := must(images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: "docker.io/library/absent:1"}}))(t); got.GetImage() != nil {
		t.Errorf("an absent image: %v", got)
	}
	if fs := must(images.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{}))(t).GetImageFilesystems(); fs[0].GetFsId().GetMountpoint() == "" || fs[0].GetTimestamp() == 0 {
		t.Errorf("file system of images: %v", fs)
	}
}

// shortDir is a folder in which the names of unix sockets fit.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "csn")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
