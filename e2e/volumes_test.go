package e2e

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// kubeletVolume makes a volume in the way of the kubelet, or gives it a new version: a new folder,
// and a link that is switched to it; then the old one goes. Each key has so many bytes.
func kubeletVolume(t *testing.T, path, version string, keys, size int) {
	t.Helper()
	folder := "..v" + version
	err := os.MkdirAll(filepath.Join(path, folder), 0o755)
	for i := range keys {
		key := fmt.Sprint("key", i)
		err = errors.Join(err, os.WriteFile(filepath.Join(path, folder, key), bytes.Repeat([]byte(version), size), 0o644))
		if link := filepath.Join(path, key); !exists(link) {
			err = errors.Join(err, os.Symlink("..data/"+key, link))
		}
	}
	data, next := filepath.Join(path, "..data"), filepath.Join(path, "..data_tmp")
	old, _ := os.Readlink(data)
	err = errors.Join(err, os.Symlink(folder, next), os.Rename(next, data))
	if old != "" {
		err = errors.Join(err, os.RemoveAll(filepath.Join(path, old)))
	}
	if err != nil {
		t.Fatal(err)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// TestNodeEmptyDirs has emptyDirs on the node: containers of a pod share them, the node sees what they hold, and
// they outlive the VM. One of medium Memory is the guest's all the same.
func TestNodeEmptyDirs(t *testing.T) {
	d := harness.Start(t, func(c *harness.Config) { c.VM.EmptyDirs = "node" })
	root := filepath.Join(t.TempDir(), "pods", "uid", "volumes", "kubernetes.io~empty-dir")
	disk, memory := filepath.Join(root, "disk"), filepath.Join(root, "memory")
	if err := errors.Join(os.MkdirAll(disk, 0o755), os.Chmod(disk, 0o777), os.MkdirAll(memory, 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", memory, "tmpfs", 0, "size=1M"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(memory, unix.MNT_DETACH) })
	mounts := func(c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{{HostPath: disk, ContainerPath: "/disk"}, {HostPath: memory, ContainerPath: "/memory"}}
	}
	pod := d.RunPod()
	pod.Run(images.Busybox, sleeper, mounts).Exec("sh", "-c", "echo shared > /disk/file; echo secret > /memory/file")
	if out := pod.Run(images.Busybox, sleeper, mounts).Exec("cat", "/disk/file", "/memory/file"); out != "shared\nsecret\n" {
		t.Errorf("another container of the pod reads %q", out)
	}
	if got := read(t, filepath.Join(disk, "file")); got != "shared\n" {
		t.Errorf("the node reads %q", got)
	}
	if exists(filepath.Join(memory, "file")) {
		t.Error("what is to stay in memory is on the node")
	}
	pod.Remove()
	if out := d.RunPod().Run(images.Busybox, sleeper, mounts).Exec("sh", "-c", "cat /disk/file; ls /memory"); out != "shared\n" {
		t.Errorf("the next VM of the pod reads %q", out)
	}
}

// testVolumes gives a pod several volumes of what the API server lets a configMap have, and one of many
// of them; then they change.
func testVolumes(t *testing.T, d *harness.Daemon) {
	const mib = 1 << 20
	root := filepath.Join(t.TempDir(), "pods", "uid", "volumes")
	keys := map[string]int{
		"configmap/one": 1, "configmap/two": 1, "configmap/three": 1, "secret/four": 1, "configmap/five": 1, "projected/many": 12,
	}
	var mounts []*runtimeapi.Mount
	for name, n := range keys {
		path := filepath.Join(root, "kubernetes.io~"+name)
		kubeletVolume(t, path, "1", n, mib)
		mounts = append(mounts, &runtimeapi.Mount{HostPath: path, ContainerPath: "/" + name, Readonly: true})
	}
	hosts := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(hosts, []byte("127.0.0.1 localhost\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	mounts = append(mounts, &runtimeapi.Mount{HostPath: hosts, ContainerPath: "/etc/hosts"})
	c := d.RunPod().Run(images.Busybox, sleeper, func(c *runtimeapi.ContainerConfig) { c.Mounts = mounts })
	if out := c.Exec("cat", "/etc/hosts"); out != "127.0.0.1 localhost\n" {
		t.Errorf("/etc/hosts is %q", out)
	}
	holds := func(name, version string) error {
		want := strings.Repeat(fmt.Sprintf("%x  -\n", sha256.Sum256(bytes.Repeat([]byte(version), mib))), keys[name])
		got := c.Exec("sh", "-c", "for f in /"+name+"/key*; do sha256sum < $f; done; cd /"+name+"; echo ..v*")
		if want += "..v" + version + "\n"; got != want {
			return fmt.Errorf("%s holds\n%swant\n%s", name, got, want)
		}
		return nil
	}
	for name := range keys {
		if err := holds(name, "1"); err != nil {
			t.Error(err)
		}
	}
	for name, n := range keys {
		kubeletVolume(t, filepath.Join(root, "kubernetes.io~"+name), "2", n, mib)
	}
	for name := range keys {
		harness.Eventually(t, "the new version", func() error { return holds(name, "2") })
	}
}

// testImageVolumes: what an image declares as a volume can be written to under a read-only root, each container has
// its own, and what the pod mounts there is seen instead.
func testImageVolumes(t *testing.T, d *harness.Daemon) {
	mounted := filepath.Join(t.TempDir(), "pods", "uid", "volumes", "kubernetes.io~configmap", "mounted")
	kubeletVolume(t, mounted, "1", 1, 1)
	pod := d.RunPod()
	for range 2 {
		c := pod.Run(images.Stateful, sleeper, func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{HostPath: mounted, ContainerPath: "/mounted", Readonly: true}}
			c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{ReadonlyRootfs: true}
		})
		const script = "cat /seeded/seed; stat -c %a /seeded/seed; echo more >>/seeded/seed; echo x >/made/new; ls /made /mounted; touch /x 2>&1 | grep -c Read-only"
		if out := c.Exec("sh", "-c", script); out != "seed\n640\n/made:\nnew\n\n/mounted:\nkey0\n1\n" {
			t.Errorf("got %q", out)
		}
	}
}
