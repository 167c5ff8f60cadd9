package network

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
)

// maxConfBytes bounds a configuration file.
const maxConfBytes = 2 << 20

// config reads the network configuration: the first file by name in ConfDir. It is read anew each
// time, which costs tens of microseconds, so a changed file counts from the next pod on. A first
// file that is broken is an error and not passed over: the next one would be another network,
// with other rules of who may talk to whom.
func (n *CNI) config() (*libcni.NetworkConfigList, error) {
	files, err := libcni.ConfFiles(n.o.ConfDir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return nil, fmt.Errorf("cni configuration: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no CNI configuration in %s: install a network plugin that puts one there, "+
			"or copy deploy/10-caisson.conflist to it: %w", n.o.ConfDir, errdefs.ErrFailedPrecondition)
	}
	slices.Sort(files)
	list, err := parseConf(files[0])
	if err != nil {
		return nil, fmt.Errorf("cni configuration %s: %w; repair it, or remove it to use the next file: %w",
			files[0], err, errdefs.ErrFailedPrecondition)
	}
	return list, nil
}

func parseConf(path string) (*libcni.NetworkConfigList, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxConfBytes {
		return nil, fmt.Errorf("%d bytes are more than the %d allowed", info.Size(), maxConfBytes)
	}
	list, err := parseConfList(path)
	if err != nil {
		return nil, err
	}
	// The name becomes part of a file name in the cache.
	if list.Name == "" || strings.ContainsRune(list.Name, filepath.Separator) {
		return nil, fmt.Errorf("network name %q", list.Name)
	}
	for i, p := range list.Plugins {
		if p.Network.Type == "" {
			return nil, fmt.Errorf("plugin %d of the list has no type", i+1)
		}
	}
	return list, nil
}

func parseConfList(path string) (*libcni.NetworkConfigList, error) {
	if strings.HasSuffix(path, ".conflist") {
		return libcni.NetworkConfFromFile(path)
	}
	// The old format of one plugin per file, which is a list of one.
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	conf, err := libcni.NetworkPluginConfFromBytes(data)
	if err != nil {
		return nil, err
	}
	list, err := json.Marshal(networkList{
		CNIVersion: conf.Network.CNIVersion, Name: conf.Network.Name, Plugins: []json.RawMessage{data},
	})
	if err != nil {
		return nil, err
	}
	return libcni.NetworkConfFromBytes(list)
}

// sysctls are those that plugins of type tuning set in the namespace of a pod whose interface has that name: the
// guest has a kernel of its own to set them in.
// Source: github.com/containernetworking/plugins, plugins/meta/tuning.
func sysctls(list *libcni.NetworkConfigList, ifName string) (map[string]string, error) {
	all := map[string]string{}
	for _, p := range list.Plugins {
		if p.Network.Type != "tuning" {
			continue
		}
		var conf struct {
			Sysctl map[string]string `json:"sysctl"`
		}
		if err := json.Unmarshal(p.Bytes, &conf); err != nil {
			return nil, fmt.Errorf("sysctls of plugin tuning: %w: %w", err, errdefs.ErrFailedPrecondition)
		}
		for name, value := range conf.Sysctl {
			if !strings.Contains(name, ".") { // a name with both has the dots of an interface
				name = strings.ReplaceAll(name, "/", ".")
			}
			all[strings.Replace(name, "IFNAME", ifName, 1)] = value
		}
	}
	return all, nil
}

// Status returns nil when pods can get a network, else the reason why not and what to do.
// Plugins of CNI 1.1 are asked themselves (STATUS).
func (n *CNI) Status(ctx context.Context) error {
	list, err := n.config()
	if err != nil {
		return err
	}
	if err := n.installed(list); err != nil {
		return err
	}
	if err := n.lib.GetStatusNetworkList(ctx, list); err != nil {
		return fmt.Errorf("cni status of network %q: %w", list.Name, err)
	}
	return nil
}

// installed looks for the plugins and for tap devices. Setup does so before it makes anything: what
// a plugin has made, a missing one would keep from being deleted.
func (n *CNI) installed(list *libcni.NetworkConfigList) error {
	for _, p := range list.Plugins {
		names := []string{p.Network.Type}
		if ipam := p.Network.IPAM.Type; ipam != "" && slices.Contains(delegating, p.Network.Type) {
			names = append(names, ipam)
		}
		for _, name := range names {
			if _, err := invoke.FindInPath(name, n.o.BinDirs); err != nil {
				return missingPlugin(name, n.o.BinDirs)
			}
		}
	}
	if _, err := os.Stat(tunDevice); err != nil {
		return fmt.Errorf("no tap devices: %w; run \"modprobe tun\": %w", err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// delegating are the plugins of which it is known that they run the one that ipam.type names. Others have a
// name there that is no program's, as Azure's azure-cns.
// Source: github.com/containernetworking/plugins, plugins/main.
var delegating = []string{"bridge", "dummy", "host-device", "ipvlan", "macvlan", "ptp", "tap", "vlan"}

func missingPlugin(name string, dirs []string) error {
	return fmt.Errorf("cni plugin %q is in none of %s: install it there, or name its directory in the configuration (Debian: apt install containernetworking-plugins): %w",
		name, strings.Join(dirs, ", "), errdefs.ErrFailedPrecondition)
}
