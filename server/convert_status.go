package server

import (
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/podvm"
)

// nano is a time as the CRI has it: ns since 1970, 0 for never.
func nano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func criPodState(s podvm.State) cri.PodSandboxState {
	if s == podvm.Ready {
		return cri.PodSandboxState_SANDBOX_READY
	}
	return cri.PodSandboxState_SANDBOX_NOTREADY
}

func criPodMetadata(c *podvm.PodConfig) *cri.PodSandboxMetadata {
	return &cri.PodSandboxMetadata{Name: c.Name, Namespace: c.Namespace, Uid: c.UID, Attempt: c.Attempt}
}

func criPod(s podvm.PodStatus) *cri.PodSandbox {
	return &cri.PodSandbox{
		Id:             s.ID,
		Metadata:       criPodMetadata(&s.Config),
		State:          criPodState(s.State),
		CreatedAt:      nano(s.Created),
		Labels:         s.Config.Labels,
		Annotations:    s.Config.Annotations,
		RuntimeHandler: s.Config.RuntimeHandler,
	}
}

func criPodStatus(s podvm.PodStatus) *cri.PodSandboxStatus {
	network := &cri.PodSandboxNetworkStatus{}
	for i, ip := range s.IPs {
		if i == 0 {
			network.Ip = ip
			continue
		}
		network.AdditionalIps = append(network.AdditionalIps, &cri.PodIP{Ip: ip})
	}
	return &cri.PodSandboxStatus{
		Id:             s.ID,
		Metadata:       criPodMetadata(&s.Config),
		State:          criPodState(s.State),
		CreatedAt:      nano(s.Created),
		Network:        network,
		Linux:          &cri.LinuxPodSandboxStatus{Namespaces: &cri.Namespace{Options: criNamespaces(&s.Config)}},
		Labels:         s.Config.Labels,
		Annotations:    s.Config.Annotations,
		RuntimeHandler: s.Config.RuntimeHandler,
	}
}

// criNamespaces says what was asked for: the kubelet compares it with what it wants.
func criNamespaces(c *podvm.PodConfig) *cri.NamespaceOption {
	mode := func(host bool) cri.NamespaceMode {
		if host {
			return cri.NamespaceMode_NODE
		}
		return cri.NamespaceMode_POD
	}
	o := &cri.NamespaceOption{Network: mode(c.HostNetwork), Ipc: mode(c.HostIPC), Pid: cri.NamespaceMode_CONTAINER}
	switch {
	case c.HostPID:
		o.Pid = cri.NamespaceMode_NODE
	case c.SharePID:
		o.Pid = cri.NamespaceMode_POD
	}
	if c.Security.UserNamespace {
		o.UsernsOptions = &cri.UserNamespace{
			Mode: cri.NamespaceMode_POD, Uids: criIDMaps(c.Security.UIDs), Gids: criIDMaps(c.Security.GIDs),
		}
	}
	return o
}

func criIDMaps(list []podvm.IDMap) []*cri.IDMapping {
	var all []*cri.IDMapping
	for _, m := range list {
		all = append(all, &cri.IDMapping{ContainerId: m.Container, HostId: m.Host, Length: m.Length})
	}
	return all
}

func criContainerState(s podvm.State) cri.ContainerState {
	switch s {
	case podvm.Created:
		return cri.ContainerState_CONTAINER_CREATED
	case podvm.Running:
		return cri.ContainerState_CONTAINER_RUNNING
	case podvm.Exited:
		return cri.ContainerState_CONTAINER_EXITED
	}
	return cri.ContainerState_CONTAINER_UNKNOWN
}

func criContainerMetadata(c *podvm.ContainerConfig) *cri.ContainerMetadata {
	return &cri.ContainerMetadata{Name: c.Name, Attempt: c.Attempt}
}

func criContainer(s podvm.ContainerStatus) *cri.Container {
	return &cri.Container{
		Id:           s.ID,
		PodSandboxId: s.Pod,
		Metadata:     criContainerMetadata(&s.Config),
		Image:        criImageSpec(&s.Config),
		ImageRef:     criImageRef(s),
		ImageId:      s.Config.Image,
		State:        criContainerState(s.State),
		CreatedAt:    nano(s.Created),
		Labels:       s.Config.Labels,
		Annotations:  s.Config.Annotations,
	}
}

func criImageSpec(c *podvm.ContainerConfig) *cri.ImageSpec {
	return &cri.ImageSpec{Image: c.ImageName, UserSpecifiedImage: c.ImageName, ImageRef: c.Image}
}

// criImageRef names the image by its registry's digest, or by its id where it has none, or where the container
// is of a daemon that did not know. It is for people to read: the kubelet goes by the id.
func criImageRef(s podvm.ContainerStatus) string {
	if s.ImageRef != "" {
		return s.ImageRef
	}
	return s.Config.Image
}

func criContainerStatus(s podvm.ContainerStatus) *cri.ContainerStatus {
	c := &cri.ContainerStatus{
		Id:          s.ID,
		Metadata:    criContainerMetadata(&s.Config),
		State:       criContainerState(s.State),
		CreatedAt:   nano(s.Created),
		Image:       criImageSpec(&s.Config),
		ImageRef:    criImageRef(s),
		ImageId:     s.Config.Image,
		Reason:      s.Reason,
		Message:     s.Message,
		Labels:      s.Config.Labels,
		Annotations: s.Config.Annotations,
		Mounts:      criMounts(s.Config.Mounts),
		LogPath:     s.LogPath,
		Resources:   &cri.ContainerResources{Linux: criResources(s.Config.Resources)},
		StopSignal:  cri.Signal_SIGNAL_SIGTERM,
	}
	if s.State != podvm.Created {
		c.StartedAt = nano(s.Started)
	}
	if s.State == podvm.Exited || s.State == podvm.Unknown {
		c.FinishedAt, c.ExitCode = nano(s.Finished), s.ExitCode
	}
	if sig, err := parseSignal(s.Config.StopSignal); err == nil {
		c.StopSignal = sig
	}
	if s.User != nil {
		c.User = &cri.ContainerUser{Linux: &cri.LinuxContainerUser{
			Uid: s.User.UID, Gid: s.User.GID, SupplementalGroups: s.User.SupplementalGroups,
		}}
	}
	return c
}

func criMounts(list []podvm.Mount) []*cri.Mount {
	var all []*cri.Mount
	for _, m := range list {
		c := &cri.Mount{
			HostPath: m.HostPath, ContainerPath: m.ContainerPath, ImageSubPath: m.SubPath,
			Readonly: m.ReadOnly, RecursiveReadOnly: m.RecursiveReadOnly, SelinuxRelabel: m.SELinuxRelabel,
		}
		if m.Image != "" {
			c.Image = &cri.ImageSpec{Image: m.Image}
		}
		for p, name := range propagations {
			if name == m.Propagation {
				c.Propagation = p
			}
		}
		all = append(all, c)
	}
	return all
}
