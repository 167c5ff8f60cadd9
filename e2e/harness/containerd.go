package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// HasContainerd tells whether this machine has containerd and runc.
func HasContainerd() bool {
	for _, name := range []string{"containerd", "runc"} {
		if _, err := exec.LookPath(name); err != nil {
			return false
		}
	}
	return true
}

// StartContainerd runs containerd with runc for comparison, with the same images and the same kind of
// network as a daemon's, and returns the address of its CRI socket. It ends with the test.
func StartContainerd(t testing.TB) string {
	t.Helper()
	dir := Scratch(t)
	socket := filepath.Join(dir, "c.sock")
	cni := filepath.Join(dir, "cni")
	WriteCNI(t, cni, filepath.Join(dir, "ipam"))
	public := SharedRegistries(t).Public.Addr()
	config := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = %q
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.9"
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = %q
  [plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]
    endpoint = ["http://%s/v2/docker.io"]
  [plugins."io.containerd.grpc.v1.cri".registry.mirrors."registry.k8s.io"]
    endpoint = ["http://%s/v2/registry.k8s.io"]
`, filepath.Join(dir, "root"), filepath.Join(dir, "state"), socket, cni, public, public)
	file := filepath.Join(dir, "containerd.toml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	// Its shims' sockets are there, wherever its state is: in the suite's own /run. Made now, it is
	// no leak of a daemon that runs beside it.
	const shims = "/run/containerd"
	if err := os.MkdirAll(shims, 0o711); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "containerd.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("containerd", "--config", file)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(cmd.Process.Signal(unix.SIGTERM), cmd.Wait()); err != nil {
			t.Errorf("end containerd: %v", err)
		}
		if err := errors.Join(os.RemoveAll(dir), os.RemoveAll(shims)); err != nil {
			t.Error(err)
		}
	})
	address := "unix://" + socket
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	Eventually(t, "containerd is ready", func() error {
		if err := conditions(t.Context(), conn); err != nil {
			text, _ := os.ReadFile(log.Name())
			return fmt.Errorf("%w\n%s", err, text[max(0, len(text)-2000):])
		}
		return nil
	})
	return address
}

// conditions says what of a runtime is not ready.
func conditions(ctx context.Context, conn *grpc.ClientConn) error {
	s, err := runtimeapi.NewRuntimeServiceClient(conn).Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return err
	}
	for _, c := range s.Status.Conditions {
		if !c.Status {
			return fmt.Errorf("%s: %s", c.Type, c.Message)
		}
	}
	return nil
}
