package server

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/podvm"
)

// handlers are the RuntimeClass handlers that are served, all in the same way. The last is the
// name that managed Kubernetes offerings have for pods in VMs.
var handlers = []string{"", "caisson", "kata-vm-isolation"}

// Limits of names, in bytes.
const (
	maxName     = 253
	maxHostname = 64 // the kernel's
	maxDNSLine  = 2048
)

var (
	nameRE     = regexp.MustCompile(`^[A-Za-z0-9][-A-Za-z0-9_.]*$`)
	hostnameRE = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$`)
	sysctlRE   = regexp.MustCompile(`^[a-z0-9]([-_a-z0-9]*[a-z0-9])?([./][a-zA-Z0-9]([-_a-zA-Z0-9]*[a-zA-Z0-9])?)+$`)
)

// invalid is an errdefs.ErrInvalidArgument.
func invalid(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

func checkName(what, s string) error {
	if len(s) > maxName || !nameRE.MatchString(s) {
		return invalid("%s %q: want 1 to %d characters of A-Z, a-z, 0-9, '-', '_', '.'", what, s, maxName)
	}
	return nil
}

// checkText refuses what would end a line or a C string.
func checkText(what string, values ...string) error {
	for _, s := range values {
		if strings.ContainsAny(s, "\x00\n") {
			return invalid("%s %q: contains a newline or a NUL byte", what, s)
		}
	}
	return nil
}

func checkAbs(what, path string) error {
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
		return invalid("%s %q: want an absolute path", what, path)
	}
	return nil
}

// checkHandler returns an error for a runtime handler that isn't served.
func checkHandler(name string) error {
	if !slices.Contains(handlers, name) {
		return invalid("runtime handler %q is unknown; use one of %q in the RuntimeClass", name, handlers)
	}
	return nil
}

// podConfig converts and checks what RunPodSandbox is given.
func podConfig(c *cri.PodSandboxConfig, handler string) (podvm.PodConfig, error) {
	p := podvm.PodConfig{
		Name:           c.GetMetadata().GetName(),
		Namespace:      c.GetMetadata().GetNamespace(),
		UID:            c.GetMetadata().GetUid(),
		Attempt:        c.GetMetadata().GetAttempt(),
		Labels:         c.GetLabels(),
		Annotations:    c.GetAnnotations(),
		Hostname:       c.GetHostname(),
		LogDir:         c.GetLogDirectory(),
		RuntimeHandler: handler,
		Sysctls:        map[string]string{},
		CgroupParent:   c.GetLinux().GetCgroupParent(),
	}
	if c.GetMetadata() == nil {
		return p, invalid("the pod's config has no metadata")
	}
	if err := checkHandler(handler); err != nil {
		return p, err
	}
	if err := checkPod(&p); err != nil {
		return p, err
	}
	var err error
	if p.DNS, err = dns(c.GetDnsConfig()); err != nil {
		return p, err
	}
	if p.PortMappings, err = portMappings(c.GetPortMappings()); err != nil {
		return p, err
	}
	for name, value := range c.GetLinux().GetSysctls() {
		if len(name) > maxName || !sysctlRE.MatchString(name) {
			return p, invalid("sysctl %q: not a sysctl's name", name)
		}
		if err := checkText("sysctl "+name, value); err != nil {
			return p, err
		}
		p.Sysctls[strings.ReplaceAll(name, "/", ".")] = value
	}
	if p.Resources, err = podResources(c.GetLinux().GetResources()); err != nil {
		return p, fmt.Errorf("pod resources: %w", err)
	}
	if p.Overhead, err = podResources(c.GetLinux().GetOverhead()); err != nil {
		return p, fmt.Errorf("pod overhead: %w", err)
	}
	return p, podSecurity(&p, c.GetLinux().GetSecurityContext())
}

func checkPod(p *podvm.PodConfig) error {
	for _, f := range []struct{ what, value string }{
		{"pod name", p.Name}, {"pod namespace", p.Namespace}, {"pod uid", p.UID},
	} {
		if err := checkName(f.what, f.value); err != nil {
			return err
		}
	}
	if h := p.Hostname; h != "" && (len(h) > maxHostname || !hostnameRE.MatchString(h)) {
		return invalid("hostname %q: want at most %d characters of a DNS name", h, maxHostname)
	}
	if p.LogDir != "" {
		if err := checkAbs("log directory", p.LogDir); err != nil {
			return err
		}
		p.LogDir = filepath.Clean(p.LogDir)
	}
	if parts := strings.Split(p.CgroupParent, "/"); slices.Contains(parts, "..") || strings.ContainsRune(p.CgroupParent, 0) {
		return invalid("cgroup parent %q: want a cgroup's path or a slice's name", p.CgroupParent)
	}
	return nil
}

func dns(c *cri.DNSConfig) (podvm.DNS, error) {
	d := podvm.DNS{Servers: c.GetServers(), Searches: c.GetSearches(), Options: c.GetOptions()}
	for _, s := range d.Servers {
		if _, err := netip.ParseAddr(s); err != nil {
			return d, invalid("DNS server %q: want an IP address", s)
		}
	}
	for _, s := range slices.Concat(d.Searches, d.Options) {
		if s == "" || len(s) > maxDNSLine || strings.ContainsAny(s, " \t\r\n\x00") {
			return d, invalid("DNS search domain or option %q: want one word", s)
		}
	}
	return d, nil
}

// portMappings leaves out ports without a host port: they need no mapping.
func portMappings(list []*cri.PortMapping) ([]podvm.PortMapping, error) {
	var all []podvm.PortMapping
	for _, m := range list {
		p := podvm.PortMapping{ContainerPort: m.GetContainerPort(), HostPort: m.GetHostPort(), HostIP: m.GetHostIp()}
		switch m.GetProtocol() {
		case cri.Protocol_TCP:
			p.Protocol = "tcp"
		case cri.Protocol_UDP:
			p.Protocol = "udp"
		case cri.Protocol_SCTP:
			p.Protocol = "sctp"
		default:
			return nil, invalid("port mapping: protocol %d is unknown", m.GetProtocol())
		}
		if p.HostPort == 0 {
			continue
		}
		if p.HostPort < 0 || p.HostPort > 65535 || p.ContainerPort < 1 || p.ContainerPort > 65535 {
			return nil, invalid("port mapping %d -> %d: want ports from 1 to 65535", p.HostPort, p.ContainerPort)
		}
		if p.HostIP != "" {
			if _, err := netip.ParseAddr(p.HostIP); err != nil {
				return nil, invalid("port mapping: host IP %q is not an IP address", p.HostIP)
			}
		}
		all = append(all, p)
	}
	return all, nil
}
