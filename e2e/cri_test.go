package e2e

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// testIdempotence repeats calls as the kubelet does when it did not hear the answer.
func testIdempotence(t *testing.T, d *harness.Daemon) {
	ctx, rt := t.Context(), d.Runtime()
	config := d.PodConfig()
	ids := make([]string, 3)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			pod, err := d.TryRunPod(config)
			if err != nil {
				t.Errorf("run pod: %v", err)
				return
			}
			ids[i] = pod.ID
		})
	}
	wg.Wait()
	if ids[0] == "" || ids[0] != ids[1] || ids[1] != ids[2] {
		t.Fatalf("runs of one pod at once made pods %q", ids)
	}
	pod, err := d.TryRunPod(config)
	if err != nil || pod.ID != ids[0] {
		t.Fatalf("a later run of the pod made %v, %v", pod, err)
	}
	c := pod.Create(images.Busybox, sleeper)
	same := func(again *runtimeapi.ContainerConfig) {
		again.Metadata, again.LogPath = c.Config.Metadata, c.Config.LogPath
	}
	if again, err := pod.TryCreate(images.Busybox, sleeper, same); err != nil || again.ID != c.ID {
		t.Errorf("a repeated create made %v, %v", again, err)
	}
	c.Start()
	if _, err := rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ID}); status.Code(err) == codes.Internal || status.Code(err) == codes.Unknown {
		t.Errorf("a repeated start: %v", err)
	}
	for range 2 {
		c.Stop(1)
	}
	for range 2 {
		c.Remove()
	}
	for range 2 {
		pod.Remove()
	}
	if _, err := rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c.ID}); err != nil {
		t.Errorf("stop what is gone: %v", err)
	}
	if _, err := rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.ID}); status.Code(err) != codes.NotFound {
		t.Errorf("status of what is gone: got %v, want NotFound", err)
	}
	if _, err := rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod.ID}); status.Code(err) != codes.NotFound {
		t.Errorf("status of what is gone: got %v, want NotFound", err)
	}
}

func testFilters(t *testing.T, d *harness.Daemon) {
	label := func(c *runtimeapi.PodSandboxConfig) { c.Labels = map[string]string{"depth": "abyss"} }
	pod := d.RunPod(label)
	c := pod.Create(images.Busybox, sleeper, func(c *runtimeapi.ContainerConfig) { c.Labels = map[string]string{"part": "hull"} })
	created := &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_CREATED}
	running := &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}
	for _, tt := range []struct {
		filter *runtimeapi.ContainerFilter
		want   int
	}{
		{&runtimeapi.ContainerFilter{Id: c.ID[:12]}, 1},
		{&runtimeapi.ContainerFilter{PodSandboxId: pod.ID}, 1},
		{&runtimeapi.ContainerFilter{LabelSelector: map[string]string{"part": "hull"}}, 1},
		{&runtimeapi.ContainerFilter{LabelSelector: map[string]string{"part": "keel"}}, 0},
		{&runtimeapi.ContainerFilter{PodSandboxId: pod.ID, State: created}, 1},
		{&runtimeapi.ContainerFilter{PodSandboxId: pod.ID, State: running}, 0},
	} {
		r, err := d.Runtime().ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: tt.filter})
		if err != nil || len(r.Containers) != tt.want {
			t.Errorf("%v: got %v, %v, want %d", tt.filter, r.GetContainers(), err, tt.want)
		}
	}
	for _, tt := range []struct {
		filter *runtimeapi.PodSandboxFilter
		want   int
	}{
		{&runtimeapi.PodSandboxFilter{Id: pod.ID[:12]}, 1},
		{&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"depth": "abyss"}}, 1},
		{&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"depth": "shallow"}}, 0},
		{&runtimeapi.PodSandboxFilter{Id: pod.ID, State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY}}, 0},
	} {
		r, err := d.Runtime().ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{Filter: tt.filter})
		if err != nil || len(r.Items) != tt.want {
			t.Errorf("%v: got %v, %v, want %d", tt.filter, r.GetItems(), err, tt.want)
		}
	}
}

func testEvents(t *testing.T, d *harness.Daemon) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	events, err := d.Runtime().GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	// Events from before the server has the subscription may be missed, so the first is waited for.
	pod := d.RunPod()
	c := pod.Run(images.Busybox, harness.Shell("exit 3"))
	c.Wait()
	c.Remove()
	var got []string
	for !strings.HasSuffix(strings.Join(got, " "), "DELETED") {
		e, err := events.Recv()
		if err != nil {
			t.Fatalf("after %v: %v", got, err)
		}
		if e.ContainerId != c.ID {
			continue
		}
		got = append(got, strings.TrimSuffix(strings.TrimPrefix(e.ContainerEventType.String(), "CONTAINER_"), "_EVENT"))
		if e.PodSandboxStatus.GetId() != pod.ID {
			t.Errorf("an event of pod %q", e.PodSandboxStatus.GetId())
		}
	}
	if want := "CREATED STARTED STOPPED DELETED"; strings.Join(got, " ") != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

// testBadNames sends names and ids that no kubelet would.
func testBadNames(t *testing.T, d *harness.Daemon) {
	ctx, rt := t.Context(), d.Runtime()
	for _, tt := range []struct {
		name   string
		change func(*runtimeapi.PodSandboxConfig)
		want   string
	}{
		{"no metadata", func(c *runtimeapi.PodSandboxConfig) { c.Metadata = nil }, "metadata"},
		{"no name", func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = "" }, "name"},
		{"relative log directory", func(c *runtimeapi.PodSandboxConfig) { c.LogDirectory = "logs" }, "absolute"},
		{"hostname with a slash", func(c *runtimeapi.PodSandboxConfig) { c.Hostname = "a/../b" }, "hostname"},
		{"hostname too long", func(c *runtimeapi.PodSandboxConfig) { c.Hostname = strings.Repeat("x", 65) }, "hostname"},
		{"sysctl of the node", func(c *runtimeapi.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{"../../etc/passwd": "1"} }, "sysctl"},
		{"host port out of range", func(c *runtimeapi.PodSandboxConfig) {
			c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 70000}}
		}, "port"},
	} {
		pod, err := d.TryRunPod(d.PodConfig(tt.change))
		if err == nil {
			pod.Remove()
		}
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want InvalidArgument with %q", tt.name, err, tt.want)
		}
	}
	pod := d.RunPod()
	for _, tt := range []struct {
		name   string
		change func(*runtimeapi.ContainerConfig)
		want   string
	}{
		{"no image", func(c *runtimeapi.ContainerConfig) { c.Image = nil }, "image"},
		{"log outside the log directory", func(c *runtimeapi.ContainerConfig) { c.LogPath = "../../escape.log" }, "log"},
		{"absolute log path", func(c *runtimeapi.ContainerConfig) { c.LogPath = "/etc/passwd" }, "log"},
		{"group without user", func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{RunAsGroup: &runtimeapi.Int64Value{Value: 7}}
		}, "user"},
	} {
		_, err := pod.TryCreate(images.Busybox, sleeper, tt.change)
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want InvalidArgument with %q", tt.name, err, tt.want)
		}
	}
	if _, err := pod.TryCreate("docker.io/library/never-pulled:1", sleeper); status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "pull") {
		t.Errorf("an image that was not pulled: got %v, want NotFound with a hint to pull", err)
	}
	for _, id := range []string{"", "..", "../..", "no-such-id", strings.Repeat("f", 64), strings.Repeat("f", 4096), "\x00"} {
		if _, err := rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id}); err == nil {
			t.Errorf("status of pod %.20q succeeded", id)
		}
		if _, err := rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id}); err == nil {
			t.Errorf("status of container %.20q succeeded", id)
		}
		if _, err := rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); err == nil {
			t.Errorf("start of container %.20q succeeded", id)
		}
	}
	if _, err := rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod.ID}); err != nil {
		t.Errorf("the good pod: %v", err)
	}
}
