package server

import (
	"context"
	"os"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Version names this runtime.
func (s *runtimeService) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{
		Version:           "0.1.0", // of the kubelet's runtime API, the same for all runtimes
		RuntimeName:       "caisson",
		RuntimeVersion:    s.o.Version,
		RuntimeApiVersion: "v1",
	}, nil
}

// Status says whether pods can be run, whether they get a network, and what they can use.
func (s *runtimeService) Status(ctx context.Context, r *cri.StatusRequest) (*cri.StatusResponse, error) {
	resp := &cri.StatusResponse{
		Status: &cri.RuntimeStatus{Conditions: []*cri.RuntimeCondition{
			condition(ctx, "RuntimeReady", "RuntimeNotReady", s.o.Runtime),
			condition(ctx, "NetworkReady", "NetworkPluginNotReady", s.o.Network),
		}},
		Features: &cri.RuntimeFeatures{SupplementalGroupsPolicy: true},
	}
	for _, name := range handlers {
		resp.RuntimeHandlers = append(resp.RuntimeHandlers, &cri.RuntimeHandler{
			Name: name,
			Features: &cri.RuntimeHandlerFeatures{
				RecursiveReadOnlyMounts: s.o.Features.RecursiveReadOnlyMounts,
				UserNamespaces:          s.o.Features.UserNamespaces,
			},
		})
	}
	var err error
	if r.GetVerbose() {
		resp.Info, err = encode(s.o.Info)
	}
	return resp, err
}

// condition is true when the check, if there is one, finds nothing wrong.
func condition(ctx context.Context, name, reason string, check func(context.Context) error) *cri.RuntimeCondition {
	c := &cri.RuntimeCondition{Type: name, Status: true}
	if check == nil {
		return c
	}
	if err := check(ctx); err != nil {
		c.Status, c.Reason, c.Message = false, reason, err.Error()
	}
	return c
}

// RuntimeConfig tells the kubelet which cgroup driver to use.
func (s *runtimeService) RuntimeConfig(context.Context, *cri.RuntimeConfigRequest) (*cri.RuntimeConfigResponse, error) {
	driver := cri.CgroupDriver_CGROUPFS
	if s.o.CgroupDriver == "systemd" {
		driver = cri.CgroupDriver_SYSTEMD
	}
	return &cri.RuntimeConfigResponse{Linux: &cri.LinuxRuntimeConfiguration{CgroupDriver: driver}}, nil
}

// UpdateRuntimeConfig takes note of the node's pod CIDR. Addresses are the CNI plugin's matter, so
// there is nothing to configure.
func (s *runtimeService) UpdateRuntimeConfig(context.Context, *cri.UpdateRuntimeConfigRequest) (*cri.UpdateRuntimeConfigResponse, error) {
	return &cri.UpdateRuntimeConfigResponse{}, nil
}

// CheckpointContainer is not possible: what can be saved of a VM is all of it.
func (s *runtimeService) CheckpointContainer(context.Context, *cri.CheckpointContainerRequest) (*cri.CheckpointContainerResponse, error) {
	return nil, unimplemented("checkpoint of a container", "a VM can only be saved as a whole")
}

// CheckpointPod is not implemented.
func (s *runtimeService) CheckpointPod(context.Context, *cri.CheckpointPodRequest) (*cri.CheckpointPodResponse, error) {
	return nil, unimplemented("checkpoint of a pod", "this version can't save a pod's VM")
}

// RestorePod is not implemented.
func (s *runtimeService) RestorePod(context.Context, *cri.RestorePodRequest) (*cri.RestorePodResponse, error) {
	return nil, unimplemented("restore of a pod", "this version can't save a pod's VM")
}

// detectCgroupDriver is "systemd" where systemd is PID 1 and cgroups are those of version 2.
func detectCgroupDriver() string {
	var fs unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &fs); err != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return "cgroupfs"
	}
	if info, err := os.Lstat("/run/systemd/system"); err != nil || !info.IsDir() {
		return "cgroupfs"
	}
	return "systemd"
}
