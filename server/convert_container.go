package server

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/imagestore"
	"github.com/caisson-vm/caisson/podvm"
)

// lookup finds an image by any of its names.
type lookup func(ref string) (imagestore.Image, error)

// containerConfig converts and checks what CreateContainer is given. The image, and those of
// image volumes, must be in the store.
func containerConfig(c *cri.ContainerConfig, find lookup) (podvm.ContainerConfig, error) {
	p := podvm.ContainerConfig{
		Name:        c.GetMetadata().GetName(),
		Attempt:     c.GetMetadata().GetAttempt(),
		Labels:      c.GetLabels(),
		Annotations: c.GetAnnotations(),
		Command:     c.GetCommand(),
		Args:        c.GetArgs(),
		WorkingDir:  c.GetWorkingDir(),
		LogPath:     c.GetLogPath(),
		Stdin:       c.GetStdin(),
		StdinOnce:   c.GetStdinOnce(),
		TTY:         c.GetTty(),
	}
	if c.GetMetadata() == nil {
		return p, invalid("the container's config has no metadata")
	}
	if err := checkContainer(&p); err != nil {
		return p, err
	}
	if len(c.GetCDIDevices()) > 0 {
		return p, fmt.Errorf("CDI device %q: the node's devices don't reach a pod in a VM; leave out the claim or resource that brings it, or run the pod on a node with another runtime: %w", c.GetCDIDevices()[0].GetName(), errdefs.ErrNotImplemented)
	}
	if err := containerImage(&p, c, find); err != nil {
		return p, err
	}
	var err error
	if p.Env, err = env(c.GetEnvs()); err != nil {
		return p, err
	}
	if p.Mounts, err = mounts(c.GetMounts(), find); err != nil {
		return p, err
	}
	if p.Devices, err = devices(c.GetDevices()); err != nil {
		return p, err
	}
	if p.Resources, err = resources(c.GetLinux().GetResources()); err != nil {
		return p, err
	}
	p.Security, err = containerSecurity(c.GetLinux().GetSecurityContext())
	return p, err
}

func checkContainer(p *podvm.ContainerConfig) error {
	if err := checkName("container name", p.Name); err != nil {
		return err
	}
	for _, arg := range slices.Concat(p.Command, p.Args) {
		if strings.ContainsRune(arg, 0) {
			return invalid("argument %q contains a NUL byte", arg)
		}
	}
	if p.WorkingDir != "" {
		if err := checkAbs("working directory", p.WorkingDir); err != nil {
			return err
		}
	}
	if p.LogPath != "" && (!filepath.IsLocal(p.LogPath) || strings.ContainsRune(p.LogPath, 0)) {
		return invalid("log path %q: want a path inside the pod's log directory", p.LogPath)
	}
	return nil
}

// containerImage finds the image and the signal that stops it.
func containerImage(p *podvm.ContainerConfig, c *cri.ContainerConfig, find lookup) error {
	ref := c.GetImage().GetImage()
	if ref == "" {
		return invalid("the container's config names no image")
	}
	image, err := find(ref)
	if err != nil {
		return fmt.Errorf("image of container %s: %w", p.Name, err)
	}
	p.Image, p.ImageName = image.ID, ref
	if name := c.GetImage().GetUserSpecifiedImage(); name != "" {
		p.ImageName = name
	}
	p.StopSignal, err = stopSignal(c.GetStopSignal(), image.Config.Config.StopSignal)
	return err
}

func env(list []*cri.KeyValue) ([]podvm.EnvVar, error) {
	var all []podvm.EnvVar
	for _, e := range list {
		name, value := e.GetKey(), e.GetValue()
		if name == "" || strings.ContainsAny(name, "=\x00") {
			return nil, invalid("environment variable %q: want a name without '='", name)
		}
		if slices.Contains(value, 0) {
			return nil, invalid("environment variable %s: the value contains a NUL byte", name)
		}
		all = append(all, podvm.EnvVar{Name: name, Value: value})
	}
	return all, nil
}

var propagations = map[cri.MountPropagation]string{
	cri.MountPropagation_PROPAGATION_PRIVATE:           "private",
	cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER: "rslave",
	cri.MountPropagation_PROPAGATION_BIDIRECTIONAL:     "rshared",
}

func mounts(list []*cri.Mount, find lookup) ([]podvm.Mount, error) {
	var all []podvm.Mount
	for _, c := range list {
		m, err := mount(c, find)
		if err != nil {
			return nil, fmt.Errorf("mount at %q: %w", c.GetContainerPath(), err)
		}
		all = append(all, m)
	}
	return all, nil
}

func mount(c *cri.Mount, find lookup) (podvm.Mount, error) {
	m := podvm.Mount{
		HostPath:          c.GetHostPath(),
		ContainerPath:     c.GetContainerPath(),
		ReadOnly:          c.GetReadonly(),
		RecursiveReadOnly: c.GetRecursiveReadOnly(),
		Propagation:       propagations[c.GetPropagation()],
		SELinuxRelabel:    c.GetSelinuxRelabel(),
	}
	if err := checkAbs("container path", m.ContainerPath); err != nil {
		return m, err
	}
	if m.Propagation == "" {
		return m, invalid("propagation %d is unknown", c.GetPropagation())
	}
	if m.RecursiveReadOnly && (!m.ReadOnly || m.Propagation != "private") {
		return m, invalid("recursive_read_only needs readonly and private propagation")
	}
	if len(c.GetMountOptions()) > 0 {
		return m, fmt.Errorf("mount options %q are not supported: %w", c.GetMountOptions(), errdefs.ErrNotImplemented)
	}
	if len(c.GetUidMappings())+len(c.GetGidMappings()) > 0 {
		return m, fmt.Errorf("mapped owners are of pods with a user namespace, which are not supported yet; leave hostUsers unset: %w", errdefs.ErrNotImplemented)
	}
	if c.GetImage().GetImage() == "" {
		return m, checkAbs("host path", m.HostPath)
	}
	return m, imageMount(&m, c, find)
}

func imageMount(m *podvm.Mount, c *cri.Mount, find lookup) error {
	if m.HostPath != "" {
		return invalid("host path %q and an image: want one of them", m.HostPath)
	}
	if p := c.GetImageSubPath(); p != "" && (!filepath.IsLocal(p) || strings.ContainsRune(p, 0)) {
		return invalid("image sub path %q: want a relative path without '..'", p)
	}
	image, err := find(c.GetImage().GetImage())
	if err != nil {
		return err
	}
	m.Image, m.SubPath, m.ReadOnly = image.ID, c.GetImageSubPath(), true
	return nil
}

func devices(list []*cri.Device) ([]podvm.Device, error) {
	var all []podvm.Device
	for _, c := range list {
		d := podvm.Device{HostPath: c.GetHostPath(), ContainerPath: c.GetContainerPath(), Permissions: c.GetPermissions()}
		if err := checkAbs("device", d.HostPath); err != nil {
			return nil, err
		}
		if d.ContainerPath == "" {
			d.ContainerPath = d.HostPath
		}
		if err := checkAbs("device path in the container", d.ContainerPath); err != nil {
			return nil, err
		}
		if d.Permissions == "" {
			d.Permissions = "rwm"
		}
		if strings.Trim(d.Permissions, "rwm") != "" || len(d.Permissions) > 3 {
			return nil, invalid("device %s: permissions %q; want some of rwm", d.HostPath, d.Permissions)
		}
		all = append(all, d)
	}
	return all, nil
}
