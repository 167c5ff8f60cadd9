package server

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/imagestore"
	"github.com/caisson-vm/caisson/podvm"
)

func protoString(s string) protoreflect.Value { return protoreflect.ValueOfString(s) }

func encoded(t interface{ Fatal(...any) }, m proto.Message) []byte {
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// FuzzPodConfig: whatever is accepted can be persisted, and shown, and holds to what the rest of
// the code relies on.
func FuzzPodConfig(f *testing.F) {
	f.Add(encoded(f, fullPod()))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		var c cri.PodSandboxConfig
		if proto.Unmarshal(data, &c) != nil {
			return
		}
		p, err := podConfig(&c, "")
		if err != nil {
			return
		}
		if _, err := json.Marshal(p); err != nil {
			t.Errorf("not persistent: %v", err)
		}
		criPodStatus(podvm.PodStatus{Config: p})
		criPod(podvm.PodStatus{Config: p})
		for _, s := range []string{p.Name, p.Namespace, p.UID} {
			if s == "" || strings.ContainsAny(s, "/;=\n\x00") {
				t.Errorf("accepted the name %q", s)
			}
		}
		for k := range p.Sysctls {
			if strings.Contains(k, "..") || strings.Contains(k, "/") {
				t.Errorf("accepted the sysctl %q", k)
			}
		}
		if p.LogDir != "" && filepath.Clean(p.LogDir) != p.LogDir {
			t.Errorf("accepted the log directory %q", p.LogDir)
		}
		for _, s := range append(p.DNS.Searches, p.DNS.Options...) {
			if strings.ContainsAny(s, "\n ") {
				t.Errorf("accepted %q for resolv.conf", s)
			}
		}
	})
}

// FuzzContainerConfig is the same for containers.
func FuzzContainerConfig(f *testing.F) {
	f.Add(encoded(f, fullContainer()))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		var c cri.ContainerConfig
		if proto.Unmarshal(data, &c) != nil {
			return
		}
		all := func(string) (imagestore.Image, error) { return imagestore.Image{ID: busyboxID}, nil }
		p, err := containerConfig(&c, all)
		if err != nil {
			return
		}
		if _, err := json.Marshal(p); err != nil {
			t.Errorf("not persistent: %v", err)
		}
		status := podvm.ContainerStatus{Config: p, State: podvm.Exited}
		criContainer(status)
		if s := criContainerStatus(status); signalName(s.GetStopSignal()) != p.StopSignal {
			t.Errorf("stop signal %q is shown as %s", p.StopSignal, s.GetStopSignal())
		}
		for _, m := range p.Mounts {
			if !filepath.IsAbs(m.ContainerPath) || (m.HostPath == "") == (m.Image == "") {
				t.Errorf("accepted the mount %+v", m)
			}
		}
		for file := range p.Resources.Unified {
			if strings.ContainsAny(file, "/\x00") {
				t.Errorf("accepted the cgroup file %q", file)
			}
		}
		if p.LogPath != "" && !filepath.IsLocal(p.LogPath) {
			t.Errorf("accepted the log path %q", p.LogPath)
		}
	})
}
