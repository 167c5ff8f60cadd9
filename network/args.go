package network

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
)

// ifName is what the pod's primary interface is called.
const ifName = "eth0"

// The field's names of capabilities: CNI CONVENTIONS.md, and containerd's for annotations.
const (
	capPortMappings = "portMappings"
	capBandwidth    = "bandwidth"
	capDNS          = "dns"
	capAnnotations  = "io.kubernetes.cri.pod-annotations"
)

// runtimeConf is what the plugins are told of a pod. Each capability reaches only the plugins whose
// configuration asks for it.
func runtimeConf(p Pod, netns string) (*libcni.RuntimeConf, error) {
	rt := &libcni.RuntimeConf{
		ContainerID: p.ID, NetNS: netns, IfName: ifName,
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", p.Namespace},
			{"K8S_POD_NAME", p.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", p.ID},
			{"K8S_POD_UID", p.UID},
		},
		CapabilityArgs: map[string]any{},
	}
	for _, a := range rt.Args {
		if strings.ContainsAny(a[1], ";=") { // they separate the arguments
			return nil, fmt.Errorf("%s %q contains ';' or '=': %w", a[0], a[1], errdefs.ErrInvalidArgument)
		}
	}
	ports, err := portMappings(p.PortMappings)
	if err != nil {
		return nil, err
	}
	if len(ports) > 0 {
		rt.CapabilityArgs[capPortMappings] = ports
	}
	shape, err := bandwidth(p.Annotations)
	if err != nil {
		return nil, err
	}
	if len(shape) > 0 {
		rt.CapabilityArgs[capBandwidth] = shape
	}
	if d := p.DNS; len(d.Servers)+len(d.Searches)+len(d.Options) > 0 {
		rt.CapabilityArgs[capDNS] = map[string]any{"servers": d.Servers, "searches": d.Searches, "options": d.Options}
	}
	if len(p.Annotations) > 0 {
		rt.CapabilityArgs[capAnnotations] = p.Annotations
	}
	return rt, nil
}

// portMappings are those that name a port of the node; the kubelet lists the others too.
func portMappings(mappings []PortMapping) ([]map[string]any, error) {
	var out []map[string]any
	for _, m := range mappings {
		if m.HostPort == 0 {
			continue
		}
		proto := strings.ToLower(m.Protocol)
		if proto != "tcp" && proto != "udp" && proto != "sctp" {
			return nil, fmt.Errorf("port mapping: protocol %q is not tcp, udp or sctp: %w", m.Protocol, errdefs.ErrInvalidArgument)
		}
		for _, port := range []int32{m.HostPort, m.ContainerPort} {
			if port < 1 || port > 65535 {
				return nil, fmt.Errorf("port mapping: port %d is not 1 to 65535: %w", port, errdefs.ErrInvalidArgument)
			}
		}
		entry := map[string]any{"hostPort": m.HostPort, "containerPort": m.ContainerPort, "protocol": proto}
		if m.HostIP != "" {
			entry["hostIP"] = m.HostIP
		}
		out = append(out, entry)
	}
	return out, nil
}
