package podvm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// kubeletVolumeAt makes a volume as the kubelet lays it out, of so many files of a size, or gives it a
// new version.
func kubeletVolumeAt(t *testing.T, path, version string, files, size int) {
	t.Helper()
	folder := "..v" + version
	err := os.MkdirAll(filepath.Join(path, folder), 0o755)
	for i := range files {
		name := fmt.Sprint("file", i)
		err = errors.Join(err, os.WriteFile(filepath.Join(path, folder, name), bytes.Repeat([]byte(version), size), 0o644))
		if link := filepath.Join(path, name); version == "1" {
			err = errors.Join(err, os.Symlink(dataLink+"/"+name, link))
		}
	}
	tmp := filepath.Join(path, "..data_tmp")
	if err = errors.Join(err, os.Symlink(folder, tmp), os.Rename(tmp, filepath.Join(path, dataLink))); err != nil {
		t.Fatal(err)
	}
}

// content is how many files, and bytes of them, the messages have.
func content(sets ...*agent.Files) (files, bytes int) {
	for _, s := range sets {
		files += len(s.Files)
		for _, f := range s.Files {
			bytes += len(f.Content)
		}
	}
	return files, bytes
}

// TestVolumesInPieces: volumes of any size reach the guest in messages that are not too large, and
// small ones with no message of their own.
func TestVolumesInPieces(t *testing.T) {
	const mib = 1 << 20
	n := newNode(t)
	p := n.pod(podConfig("web"))
	a := n.agentOf(p.ID())
	volumes := filepath.Join(n.dir, "pods", "uid", "volumes", "kubernetes.io~projected")
	small, large := filepath.Join(volumes, "small"), filepath.Join(volumes, "large")
	kubeletVolumeAt(t, small, "1", 3, 100)
	kubeletVolumeAt(t, large, "1", 9, mib)
	config := containerConfig("main")
	config.Mounts = []Mount{{HostPath: small, ContainerPath: "/small", ReadOnly: true}, {HostPath: large, ContainerPath: "/large", ReadOnly: true}}
	for i := range 5 {
		file := filepath.Join(n.dir, fmt.Sprint("single", i))
		if err := os.WriteFile(file, make([]byte, mib), 0o644); err != nil {
			t.Fatal(err)
		}
		config.Mounts = append(config.Mounts, Mount{HostPath: file, ContainerPath: "/" + filepath.Base(file)})
	}
	request := a.container(n.container(p, config).ID()).request
	if files, bytes := content(request.Mounts[0].GetFiles()); files != 9 || bytes != 300 {
		t.Errorf("the small volume has %d files, %d bytes in the request for the container", files, bytes)
	}
	for _, m := range request.Mounts[1:] {
		if f := m.GetFiles(); len(f.Files) > 0 || f.Name == "" || f.Single == (m.Destination == "/large") {
			t.Errorf("%s is in the request: %d files", m.Destination, len(f.Files))
		}
	}
	pieces := func(name string) (of []*agent.Files) {
		for _, f := range a.files {
			if size := proto.Size(f); size > mib+1024 {
				t.Errorf("a message of %d bytes", size)
			}
			if f.Name == name {
				of = append(of, f)
			}
		}
		return of
	}
	brought := pieces(setName(large))
	if files, bytes := content(brought...); files != 21 || bytes != 9*mib || len(brought) < 9 {
		t.Errorf("%d pieces with %d files, %d bytes", len(brought), files, bytes)
	}
	before := 0
	for i, f := range brought {
		if int(f.Before) != before || f.More != (i < len(brought)-1) {
			t.Errorf("piece %d comes after %d files, want %d; more: %v", i, f.Before, before, f.More)
		}
		before += len(f.Files)
	}
	if files, _ := content(a.files...); files != 21+5 {
		t.Errorf("%d files came ahead, want those of the large volume and the single ones", files)
	}
	a.do(func() { a.files = nil })
	kubeletVolumeAt(t, large, "2", 9, mib)
	var update []*agent.Files
	n.until("the update", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		update = pieces(setName(large))
		return len(update) > 0 && !update[len(update)-1].More
	})
	// The version before is still there, as the kubelet leaves it for a moment.
	if files, bytes := content(update...); files != 21 || bytes != 9*mib {
		t.Errorf("the update has %d files, %d bytes", files, bytes)
	}
}

func TestVolumesTooLarge(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	volumes := filepath.Join(n.dir, "pods", "uid", "volumes", "kubernetes.io~projected")
	for name, size := range map[string]struct{ files, bytes int }{
		"file":   {1, fileMax + 1},
		"volume": {agent.FilesSize/fileMax + 1, fileMax},
		"many":   {agent.FilesMax / 2, 0},
	} {
		path := filepath.Join(volumes, name)
		kubeletVolumeAt(t, path, "1", size.files, size.bytes)
		config := containerConfig(name)
		config.Mounts = []Mount{{HostPath: path, ContainerPath: "/m"}}
		if _, err := p.Create(soon(t), config); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), insteadOfCopy) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
