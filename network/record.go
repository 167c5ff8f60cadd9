package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/libcni"
)

// record is what ADD was, or was about to be, called with, so that DEL is called with the same
// even when the configuration has changed since, or the daemon or the machine went down during
// ADD. (libcni's own cache is written only after ADD, and does not have plugins from the
// network's directory.)
type record struct {
	Version      int
	Network      networkList
	IfName       string
	NetNS        string
	Args         [][2]string
	Capabilities map[string]any
}

const recordVersion = 1

// networkList is a network configuration list with all of its plugins in it.
type networkList struct {
	CNIVersion   string            `json:"cniVersion"`
	Name         string            `json:"name"`
	DisableCheck bool              `json:"disableCheck"`
	DisableGC    bool              `json:"disableGC"`
	Plugins      []json.RawMessage `json:"plugins"`
}

func (n *CNI) recordDir() string { return filepath.Join(n.o.CacheDir, "pods") }

func (n *CNI) recordPath(id string) string { return filepath.Join(n.recordDir(), id+".json") }

// knows tells whether anything of the pod's network may exist.
func (n *CNI) knows(id string) bool {
	for _, path := range []string{n.recordPath(id), n.netnsPath(id)} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			return true
		}
	}
	return false
}

// writeRecord does not wait for the disk, which would cost a start milliseconds: the plugins'
// state that the record is about isn't safe before it either. After a power failure the file may
// be empty; its name alone makes Teardown call DEL.
func (n *CNI) writeRecord(list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) error {
	r := record{
		Version: recordVersion,
		Network: networkList{
			CNIVersion: list.CNIVersion, Name: list.Name,
			DisableCheck: list.DisableCheck, DisableGC: list.DisableGC,
		},
		IfName: rt.IfName, NetNS: rt.NetNS, Args: rt.Args, Capabilities: rt.CapabilityArgs,
	}
	for _, p := range list.Plugins {
		r.Network.Plugins = append(r.Network.Plugins, p.Bytes)
	}
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("network record: %w", err)
	}
	if err := os.MkdirAll(n.recordDir(), 0o700); err != nil {
		return fmt.Errorf("network record: %w", err)
	}
	if err := os.WriteFile(n.recordPath(rt.ContainerID), data, 0o600); err != nil {
		return fmt.Errorf("network record: %w", err)
	}
	return nil
}

// attachment returns what DEL and CHECK of a known pod are to be called with: what the record
// says, else libcni's cache, else the present configuration. A nil list means that there is
// nothing to call.
func (n *CNI) attachment(p Pod) (*libcni.NetworkConfigList, *libcni.RuntimeConf, error) {
	list, rt, err := n.readRecord(p.ID)
	if err == nil {
		return list, rt, nil // no list: it was opened, and no plugin was called
	}
	unrecorded := errors.Is(err, fs.ErrNotExist)
	slog.Warn("no network record, deleting by what else is known", "pod", p.ID, "err", err)
	if list, rt = n.cached(p.ID); list != nil {
		return list, rt, nil
	}
	rt, err = runtimeConf(Pod{ID: p.ID, Name: p.Name, Namespace: p.Namespace, UID: p.UID}, n.netnsPath(p.ID))
	if err != nil {
		return nil, nil, err
	}
	list, err = n.config()
	if err != nil && unrecorded {
		return nil, nil, nil // a namespace of ours and nothing that says a plugin ever saw it
	}
	return list, rt, err
}

// cached is what libcni remembers of a finished ADD, nil when it doesn't.
func (n *CNI) cached(id string) (*libcni.NetworkConfigList, *libcni.RuntimeConf) {
	found, err := n.lib.GetCachedAttachments(id)
	if err != nil || len(found) == 0 {
		return nil, nil
	}
	a := found[0]
	list, err := libcni.NetworkConfFromBytes(a.Config)
	if err != nil || len(list.Plugins) == 0 {
		return nil, nil
	}
	return list, &libcni.RuntimeConf{
		ContainerID: id, NetNS: n.netnsPath(id), IfName: a.IfName, Args: a.CniArgs, CapabilityArgs: a.CapabilityArgs,
	}
}

func (n *CNI) readRecord(id string) (*libcni.NetworkConfigList, *libcni.RuntimeConf, error) {
	data, err := os.ReadFile(n.recordPath(id))
	if err != nil {
		return nil, nil, err
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, nil, err
	}
	if r.Version != recordVersion {
		return nil, nil, fmt.Errorf("version %d is not %d", r.Version, recordVersion)
	}
	if len(r.Network.Plugins) == 0 {
		return nil, nil, nil
	}
	conf, err := json.Marshal(r.Network)
	if err != nil {
		return nil, nil, err
	}
	list, err := libcni.NetworkConfFromBytes(conf)
	if err != nil {
		return nil, nil, err
	}
	return list, &libcni.RuntimeConf{
		ContainerID: id, NetNS: r.NetNS, IfName: r.IfName, Args: r.Args, CapabilityArgs: r.Capabilities,
	}, nil
}

// known lists the ids of all pods that may have a network. Records alone say so: other runtimes may
// keep their namespaces beside ours.
func (n *CNI) known() ([]string, error) {
	entries, err := os.ReadDir(n.recordDir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list pod networks: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), ".json"); ok && validID(id) == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}
