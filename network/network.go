// Package network gives a pod its network: a network namespace with the CNI's interfaces, and for
// each of them a tap device that a VM's network card is backed by.
package network

import (
	"net"
)

// Pod is what the network must know of a pod.
type Pod struct {
	// ID names the namespace and is the CNI's container id.
	ID string
	// Name, Namespace and UID are passed to the CNI as K8S_POD_NAME, ...
	Name, Namespace, UID string
	Annotations          map[string]string
	PortMappings         []PortMapping
	// DNS is passed to plugins with the dns capability.
	DNS DNS
}

// PortMapping forwards a port of the node to one of the pod (capability portMappings).
type PortMapping struct {
	Protocol                string // "tcp", "udp", "sctp"
	ContainerPort, HostPort int32
	HostIP                  string
}

// DNS is a resolv.conf.
type DNS struct {
	Servers, Searches, Options []string
}

// Attachment is a pod's network as it stands. It is persisted with the pod.
type Attachment struct {
	// NetNS is the path of the pod's network namespace.
	NetNS string
	// Interfaces, the primary first.
	Interfaces []Interface
	// DNS as the CNI's result says; used when the pod's own is empty.
	DNS DNS
	// Sysctls are those that the network sets in a pod, by names with dots.
	Sysctls map[string]string `json:",omitempty"`
}

// Interface is what the guest's network card must be like, and the tap behind it.
type Interface struct {
	Name       string // eth0, in the guest as in the netns
	Tap        string // name of the tap, in NetNS
	MAC        string
	MTU        int
	Addresses  []string // CIDR
	Routes     []Route
	Neighbours []Neighbour
}

// Route is a route in the guest.
type Route struct {
	Destination string // CIDR
	Gateway     string // empty: on link
	Source      string
	Metric      int
	Scope       int
	MTU, AdvMSS int `json:",omitempty"` // bytes; 0: as the interface's
	// Type is rtnetlink's where it is not unicast: a blackhole, for one, which is over no interface.
	Type int `json:",omitempty"`
}

// Neighbour is a permanent ARP or NDP entry.
type Neighbour struct {
	Address, MAC string
}

// IPs lists the addresses of the pod's first interface without prefix lengths: those of others are of networks that
// the cluster does not know.
func (a *Attachment) IPs() []string {
	if len(a.Interfaces) == 0 {
		return nil
	}
	var ips []string
	for _, cidr := range a.Interfaces[0].Addresses {
		if ip, _, err := net.ParseCIDR(cidr); err == nil && !ip.IsLinkLocalUnicast() {
			ips = append(ips, ip.String())
		}
	}
	return ips
}
