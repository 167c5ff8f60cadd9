package server

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	criapi "k8s.io/cri-api/pkg/apis"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	criclient "k8s.io/cri-client/pkg"

	"github.com/caisson-vm/caisson/podvm"
)

// kubelet is the client that the kubelet itself uses; it checks what it is answered.
func (d *daemon) kubelet(t *testing.T, streaming bool) criapi.RuntimeService {
	t.Helper()
	c, err := criclient.NewRemoteRuntimeServiceBuilder().WithEndpoint("unix://" + d.socket).
		WithConnectionTimeout(10 * time.Second).WithUseStreaming(streaming).Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
	return c
}

func wantCode(t *testing.T, err error, want codes.Code) {
	t.Helper()
	if status.Code(err) != want {
		t.Errorf("got %v; want %s", err, want)
	}
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// running makes a pod with one running container and returns their ids.
func (d *daemon) running(t *testing.T) (pod, container string) {
	t.Helper()
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)
	pod = must(c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: fullPod()}))(t).GetPodSandboxId()
	config := fullContainer()
	config.Mounts[2].RecursiveReadOnly = false
	container = must(c.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod, Config: config, SandboxConfig: fullPod()}))(t).GetContainerId()
	must(c.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: container}))(t)
	return pod, container
}

func TestLifecycleAsTheKubelet(t *testing.T) {
	for _, streaming := range []bool{false, true} {
		t.Run(fmt.Sprintf("streaming=%v", streaming), func(t *testing.T) {
			d := start(t)
			ctx, k := t.Context(), d.kubelet(t, streaming)
			pod := must(k.RunPodSandbox(ctx, fullPod(), "caisson"))(t)
			if again := must(k.RunPodSandbox(ctx, fullPod(), "caisson"))(t); again != pod {
				t.Errorf("a retry made another pod: %s, %s", pod, again)
			}
			config := fullContainer()
			config.Mounts = config.Mounts[:2]
			container := must(k.CreateContainer(ctx, pod, config, fullPod()))(t)
			if err := k.StartContainer(ctx, container); err != nil {
				t.Fatal(err)
			}
			checkPodStatus(t, must(k.PodSandboxStatus(ctx, pod, true))(t), container)
			checkContainerStatus(t, must(k.ContainerStatus(ctx, container[:12], true))(t))
			list := must(k.ListContainers(ctx, &cri.ContainerFilter{PodSandboxId: pod[:8]}))(t)
			if len(list) != 1 || list[0].GetImageId() != busyboxID || list[0].GetPodSandboxId() != pod {
				t.Errorf("containers: %v", list)
			}
			for range 2 { // all of it is idempotent
				for what, err := range map[string]error{
					"stop container":   k.StopContainer(ctx, container, 1),
					"remove container": k.RemoveContainer(ctx, container),
					"stop pod":         k.StopPodSandbox(ctx, pod),
					"remove pod":       k.RemovePodSandbox(ctx, pod),
				} {
					if err != nil {
						t.Errorf("%s: %v", what, err)
					}
				}
			}
			if pods := must(k.ListPodSandbox(ctx, nil))(t); len(pods) != 0 {
				t.Errorf("left: %v", pods)
			}
		})
	}
}

func checkPodStatus(t *testing.T, r *cri.PodSandboxStatusResponse, container string) {
	t.Helper()
	s := r.GetStatus()
	if s.GetNetwork().GetIp() != "10.1.2.3" || len(s.GetNetwork().GetAdditionalIps()) != 1 || s.GetRuntimeHandler() != "caisson" ||
		s.GetState() != cri.PodSandboxState_SANDBOX_READY || s.GetMetadata().GetUid() != "7d0c" || s.GetCreatedAt() == 0 {
		t.Errorf("pod: %v", s)
	}
	if len(r.GetContainersStatuses()) != 1 || r.GetContainersStatuses()[0].GetId() != container || r.GetTimestamp() == 0 {
		t.Errorf("pod's containers: %v at %d", r.GetContainersStatuses(), r.GetTimestamp())
	}
	var info struct {
		Phases []struct {
			Name string  `json:"name"`
			Ms   float64 `json:"ms"`
		} `json:"phases"`
		PID    int             `json:"pid"`
		Driver string          `json:"driver"`
		Guest  string          `json:"guest"`
		Agent  string          `json:"agent"`
		Config podvm.PodConfig `json:"config"`
	}
	if err := json.Unmarshal([]byte(r.GetInfo()["info"]), &info); err != nil || info.PID != 4242 || info.Driver != "fake" || info.Guest != "0123456789abcdef" || info.Agent != "1.0" || info.Config.Name != "web-0" || len(info.Phases) != 1 || info.Phases[0].Name != "boot" || info.Phases[0].Ms != 1.5 {
		t.Errorf("info: %s, %v", r.GetInfo()["info"], err)
	}
}

func checkContainerStatus(t *testing.T, r *cri.ContainerStatusResponse) {
	t.Helper()
	s := r.GetStatus()
	if s.GetState() != cri.ContainerState_CONTAINER_RUNNING || s.GetStartedAt() == 0 || s.GetFinishedAt() != 0 || s.GetImageId() != busyboxID || s.GetImageRef() != busyboxDigest ||
		s.GetImage().GetImage() != "busybox:1" || s.GetLogPath() != "/var/log/pods/shop_web-0_7d0c/nginx/3.log" ||
		s.GetStopSignal() != cri.Signal_SIGNAL_SIGQUIT || s.GetUser().GetLinux().GetUid() != 1000 ||
		s.GetResources().GetLinux().GetMemoryLimitInBytes() != 1<<26 || s.GetResources().GetLinux().GetCpusetCpus() != "" || len(s.GetMounts()) != 2 {
		t.Errorf("container: %v", s)
	}
	if !strings.Contains(r.GetInfo()["info"], `"sandboxID"`) {
		t.Errorf("info: %v", r.GetInfo())
	}
}

func TestNotFound(t *testing.T) {
	d := start(t)
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)
	for name, call := range map[string]func(id string) error{
		"PodSandboxStatus": func(id string) error {
			_, err := c.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: id})
			return err
		},
		"CreateContainer": func(id string) error {
			_, err := c.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: id, Config: fullContainer()})
			return err
		},
		"PortForward": func(id string) error {
			_, err := c.PortForward(ctx, &cri.PortForwardRequest{PodSandboxId: id, Port: []int32{80}})
			return err
		},
		"PodSandboxStats": func(id string) error {
			_, err := c.PodSandboxStats(ctx, &cri.PodSandboxStatsRequest{PodSandboxId: id})
			return err
		},
		"UpdatePodSandboxResources": func(id string) error {
			_, err := c.UpdatePodSandboxResources(ctx, &cri.UpdatePodSandboxResourcesRequest{PodSandboxId: id})
			return err
		},
		"ContainerStatus": func(id string) error {
			_, err := c.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
			return err
		},
		"StartContainer": func(id string) error {
			_, err := c.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: id})
			return err
		},
		"Exec": func(id string) error {
			_, err := c.Exec(ctx, &cri.ExecRequest{ContainerId: id, Cmd: []string{"ls"}, Stdout: true})
			return err
		},
		"Attach": func(id string) error {
			_, err := c.Attach(ctx, &cri.AttachRequest{ContainerId: id, Stdout: true})
			return err
		},
		"ExecSync": func(id string) error {
			_, err := c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"ls"}})
			return err
		},
		"ContainerStats": func(id string) error {
			_, err := c.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: id})
			return err
		},
		"ReopenContainerLog": func(id string) error {
			_, err := c.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{ContainerId: id})
			return err
		},
		"UpdateContainerResources": func(id string) error {
			_, err := c.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: id, Linux: &cri.LinuxContainerResources{}})
			return err
		},
	} {
		if err := call("feed"); status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "feed") {
			t.Errorf("%s of an unknown id: %v", name, err)
		}
		if err := call(""); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s without an id: %v", name, err)
		}
	}
	_, err := c.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{})
	wantCode(t, err, codes.InvalidArgument)
}

// TestCreateMisses: what a container lacks is not the pod that NotFound would be about.
func TestCreateMisses(t *testing.T) {
	d := start(t, func(o *Options) { o.Features.RecursiveReadOnlyMounts = true })
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)
	r, err := c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: fullPod()})
	if err != nil {
		t.Fatal(err)
	}
	d.pods.pods[0].refusal = fmt.Errorf("mount /x: no such path: %w", errdefs.ErrNotFound)
	_, err = c.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: r.PodSandboxId, Config: fullContainer()})
	wantCode(t, err, codes.InvalidArgument)
	if !strings.Contains(err.Error(), "/x") {
		t.Error(err)
	}
}

func TestFilters(t *testing.T) {
	d := start(t)
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)
	pod, container := d.running(t)
	other := fullPod()
	other.Metadata.Uid, other.Labels = "other", map[string]string{"app": "db"}
	second := must(c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: other}))(t).GetPodSandboxId()
	must(c.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: second}))(t)

	ready := &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY}
	for name, tc := range map[string]struct {
		filter *cri.PodSandboxFilter
		want   string
	}{
		"all":             {nil, pod + " " + second},
		"by prefix":       {&cri.PodSandboxFilter{Id: pod[:6]}, pod},
		"unknown id":      {&cri.PodSandboxFilter{Id: "feed"}, ""},
		"ready":           {&cri.PodSandboxFilter{State: ready}, pod},
		"by label":        {&cri.PodSandboxFilter{LabelSelector: map[string]string{"app": "db"}}, second},
		"label and state": {&cri.PodSandboxFilter{State: ready, LabelSelector: map[string]string{"app": "db"}}, ""},
		"label not there": {&cri.PodSandboxFilter{LabelSelector: map[string]string{"x": ""}}, ""},
	} {
		var ids []string
		for _, p := range must(c.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: tc.filter}))(t).GetItems() {
			ids = append(ids, p.GetId())
		}
		if got := strings.Join(ids, " "); got != tc.want {
			t.Errorf("pods %s: %q; want %q", name, got, tc.want)
		}
	}
	exited := &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_EXITED}
	for name, tc := range map[string]struct {
		filter *cri.ContainerFilter
		n      int
	}{
		"all":        {nil, 1},
		"by id":      {&cri.ContainerFilter{Id: container[:10]}, 1},
		"by pod":     {&cri.ContainerFilter{PodSandboxId: pod[:10]}, 1},
		"other pod":  {&cri.ContainerFilter{PodSandboxId: second}, 0},
		"no pod":     {&cri.ContainerFilter{PodSandboxId: "feed"}, 0},
		"exited":     {&cri.ContainerFilter{State: exited}, 0},
		"by label":   {&cri.ContainerFilter{LabelSelector: map[string]string{"l": "1"}}, 1},
		"no label":   {&cri.ContainerFilter{LabelSelector: map[string]string{"l": "2"}}, 0},
		"id and pod": {&cri.ContainerFilter{Id: container, PodSandboxId: second}, 0},
	} {
		if got := must(c.ListContainers(ctx, &cri.ListContainersRequest{Filter: tc.filter}))(t).GetContainers(); len(got) != tc.n {
			t.Errorf("containers %s: %d; want %d", name, len(got), tc.n)
		}
	}
}

func TestUpdates(t *testing.T) {
	d := start(t)
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)
	pod, container := d.running(t)
	must(c.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{
		ContainerId: container, Linux: &cri.LinuxContainerResources{MemoryLimitInBytes: 1 << 27, CpuQuota: -1},
	}))(t)
	// podvm merges the change, the fake keeps it as it came.
	if r := d.pods.containers[0].status.Config.Resources; !reflect.DeepEqual(r, podvm.Resources{Memory: 1 << 27, CPUQuota: -1}) {
		t.Errorf("the change: %+v", r)
	}
	_, err := c.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: container})
	wantCode(t, err, codes.InvalidArgument)
	must(c.UpdatePodSandboxResources(ctx, &cri.UpdatePodSandboxResourcesRequest{
		PodSandboxId: pod, Resources: &cri.LinuxContainerResources{CpuQuota: 100, CpuPeriod: 1000},
	}))(t)
	if u := d.pods.pods[0].updates; len(u) != 1 || u[0].CPUQuota != 100 {
		t.Errorf("pod's updates: %v", u)
	}
	// No limits, less what the kubelet takes off for an overhead of 50m and 64Mi.
	must(c.UpdatePodSandboxResources(ctx, &cri.UpdatePodSandboxResourcesRequest{
		PodSandboxId: pod, Resources: &cri.LinuxContainerResources{CpuQuota: -5001, CpuPeriod: 100_000, CpuShares: 1024, MemoryLimitInBytes: -67108865},
	}))(t)
	if u := d.pods.pods[0].updates; len(u) != 2 || !reflect.DeepEqual(*u[1], podvm.Resources{CPUQuota: -1, CPUPeriod: 100_000, CPUShares: 1024, Memory: -1}) {
		t.Errorf("pod's updates: %v", u)
	}
	_, err = c.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: container, Linux: &cri.LinuxContainerResources{CpuQuota: -5001}})
	wantCode(t, err, codes.InvalidArgument)
	_, err = c.UpdatePodSandboxResources(ctx, &cri.UpdatePodSandboxResourcesRequest{
		PodSandboxId: pod, Resources: &cri.LinuxContainerResources{CpuPeriod: -1},
	})
	wantCode(t, err, codes.InvalidArgument)
}

func TestStatusAndConfig(t *testing.T) {
	down := fmt.Errorf("no CNI configuration in /etc/cni/net.d")
	d := start(t, func(o *Options) {
		o.Network = func(ctx context.Context) error { return down }
		o.Features.RecursiveReadOnlyMounts = true
		o.Info = map[string]any{"driver": "qemu", "config": map[string]int{"a": 1}}
	})
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)
	r := must(c.Status(ctx, &cri.StatusRequest{Verbose: true}))(t)
	conditions := r.GetStatus().GetConditions()
	if len(conditions) != 2 || conditions[0].GetType() != "RuntimeReady" || !conditions[0].GetStatus() {
		t.Errorf("conditions: %v", conditions)
	}
	if n := conditions[1]; n.GetType() != "NetworkReady" || n.GetStatus() || n.GetReason() != "NetworkPluginNotReady" || n.GetMessage() != down.Error() {
		t.Errorf("network: %v", n)
	}
	if r.GetInfo()["driver"] != `"qemu"` || r.GetInfo()["config"] != `{"a":1}` {
		t.Errorf("info: %v", r.GetInfo())
	}
	var names []string
	for _, h := range r.GetRuntimeHandlers() {
		names = append(names, h.GetName())
		if !h.GetFeatures().GetRecursiveReadOnlyMounts() || h.GetFeatures().GetUserNamespaces() {
			t.Errorf("features of %q: %v", h.GetName(), h.GetFeatures())
		}
	}
	if strings.Join(names, ",") != ",caisson,kata-vm-isolation" {
		t.Errorf("handlers: %q", names)
	}
	if info := must(c.Status(ctx, &cri.StatusRequest{}))(t).GetInfo(); len(info) != 0 {
		t.Errorf("info without verbose: %v", info)
	}
	v := must(c.Version(ctx, &cri.VersionRequest{}))(t)
	if v.GetRuntimeName() != "caisson" || v.GetRuntimeVersion() != "1.2.3" || v.GetRuntimeApiVersion() != "v1" {
		t.Errorf("version: %v", v)
	}
	rc := must(c.RuntimeConfig(ctx, &cri.RuntimeConfigRequest{}))(t)
	if rc.GetLinux().GetCgroupDriver() != cri.CgroupDriver_SYSTEMD {
		t.Errorf("runtime config: %v", rc)
	}
	must(c.UpdateRuntimeConfig(ctx, &cri.UpdateRuntimeConfigRequest{RuntimeConfig: &cri.RuntimeConfig{NetworkConfig: &cri.NetworkConfig{PodCidr: "10.0.0.0/24"}}}))(t)
}

// TestUnsupported: what can't be done is refused with a reason, not ignored.
func TestUnsupported(t *testing.T) {
	d := start(t)
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)
	pod, _ := d.running(t)
	_, err := c.CheckpointContainer(ctx, &cri.CheckpointContainerRequest{})
	wantCode(t, err, codes.Unimplemented)
	_, err = c.CheckpointPod(ctx, &cri.CheckpointPodRequest{})
	wantCode(t, err, codes.Unimplemented)
	_, err = c.RestorePod(ctx, &cri.RestorePodRequest{})
	wantCode(t, err, codes.Unimplemented)
	if !strings.Contains(err.Error(), "can't save") {
		t.Errorf("no reason: %v", err)
	}
	userns := fullPod()
	ids := []*cri.IDMapping{{HostId: 65536, Length: 65536}}
	userns.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &cri.UserNamespace{Uids: ids, Gids: ids}
	_, err = c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: userns})
	wantCode(t, err, codes.Unimplemented)
	_, err = c.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod, Config: fullContainer()})
	wantCode(t, err, codes.Unimplemented)
	if !strings.Contains(status.Convert(err).Message(), "RROUnsupported") {
		t.Errorf("the kubelet does not know this by its name: %v", err)
	}
}

// TestConcurrency: many clients at once. The race detector makes this test worth its name.
func TestConcurrency(t *testing.T) {
	d := start(t)
	ctx, c := t.Context(), cri.NewRuntimeServiceClient(d.conn)
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			config := fullPod()
			config.Metadata.Uid = fmt.Sprint(i / 2) // two clients for each pod
			r, err := c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config})
			if err != nil {
				t.Error(err)
				return
			}
			for _, err := range []error{
				second(c.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: r.GetPodSandboxId(), Verbose: true})),
				second(c.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})),
				second(c.ListPodSandboxStats(ctx, &cri.ListPodSandboxStatsRequest{})),
				second(c.ListPodSandboxMetrics(ctx, &cri.ListPodSandboxMetricsRequest{})),
				second(c.ListContainerStats(ctx, &cri.ListContainerStatsRequest{})),
			} {
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := len(d.pods.pods); n != 16 {
		t.Errorf("%d pods; want 16", n)
	}
}

func second[T any](_ T, err error) error { return err }
