package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	"github.com/caisson-vm/caisson/e2e/registry"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestBadPulls pulls what can't be pulled. Each error says what was wrong with what, and after all
// of them nothing is in the store.
func TestBadPulls(t *testing.T) {
	d := harness.Start(t)
	for _, tt := range []struct {
		name, ref string
		auth      *runtimeapi.AuthConfig
		code      codes.Code
		want      []string
	}{
		{"no such image", "docker.io/library/atlantis:1", nil, codes.NotFound, []string{"atlantis:1"}},
		{"no such tag", "docker.io/library/busybox:sunken", nil, codes.NotFound, []string{"busybox:sunken"}},
		{"no such digest", "docker.io/library/busybox@sha256:" + strings.Repeat("0", 64), nil, codes.NotFound, []string{"sha256:000"}},
		{"no reference", "UPPER CASE", nil, codes.InvalidArgument, []string{"UPPER CASE"}},
		{"empty reference", "", nil, codes.InvalidArgument, nil},
		{"no password", d.Registries.PrivateImage(), nil, codes.Unauthenticated, []string{images.Private, "credentials"}},
		{"wrong password", d.Registries.PrivateImage(), &runtimeapi.AuthConfig{Username: harness.User, Password: "wrong-one"}, codes.Unauthenticated, []string{images.Private, "credentials"}},
		// The kubelet knows it by the text's beginning, which only errors without a code keep.
		{"registry down", "down.test/caisson/any:1", nil, codes.Unknown, []string{"RegistryUnavailable: ", "down.test", "connection refused"}},
		{"no archive in a layer", images.Garbage, nil, codes.InvalidArgument, []string{"garbage", "tar"}},
		{"wrong DiffID", images.WrongDiffID, nil, codes.DataLoss, []string{"sha256:", "configuration"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := d.TryPull(tt.ref, tt.auth)
			if err == nil {
				t.Fatal("it was pulled")
			}
			if code := status.Code(err); code != tt.code {
				t.Errorf("got %v, want %v: %v", code, tt.code, err)
			}
			has(t, err.Error(), tt.want...)
			if strings.Contains(err.Error(), "wrong-one") {
				t.Errorf("the error has the password: %v", err)
			}
		})
	}
	for name, kind := range map[string]registry.Kind{"registry goes mid-blob": registry.Cut, "corrupt layer": registry.Corrupt} {
		t.Run(name, func(t *testing.T) {
			fault := d.Registries.Public.Break(images.Large, kind, 10<<20)
			defer d.Registries.Public.Mend(images.Large)
			_, err := d.TryPull(images.Large, nil)
			if err == nil {
				t.Fatal("it was pulled")
			}
			<-fault.Hit()
			has(t, err.Error(), images.Large)
			if kind == registry.Corrupt {
				has(t, err.Error(), "sha256:")
			}
		})
	}
	t.Run("stalled and given up", func(t *testing.T) { stalled(t, d) })
	clean(t, d)
	d.Pull(images.Large) // whole, now that nothing is broken
}

// stalled gives up a pull in the middle and sees that its end comes soon and its files go.
func stalled(t *testing.T, d *harness.Daemon) {
	fault := d.Registries.Public.Break(images.Large, registry.Stall, 10<<20)
	defer d.Registries.Public.Mend(images.Large)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-fault.Hit()
		cancel()
	}()
	start := time.Now()
	_, err := d.ImageService().PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: images.Large}})
	if status.Code(err) != codes.Canceled || time.Since(start) > 30*time.Second {
		t.Errorf("got %v after %v", err, time.Since(start))
	}
	ctx, stop := context.WithTimeout(t.Context(), time.Second)
	defer stop()
	_, err = d.ImageService().PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: images.Large}})
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("got %v, want DeadlineExceeded", err)
	}
}

// clean sees that the store has no image, and no part of one.
func clean(t *testing.T, d *harness.Daemon) {
	t.Helper()
	r, err := d.ImageService().ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	if err != nil || len(r.Images) > 0 {
		t.Errorf("images: %v, %v", r.GetImages(), err)
	}
	harness.Eventually(t, "the store is small", func() error {
		if size, large := du(t, filepath.Join(d.Config.Root, "images")); size > 1<<20 {
			return missing{"end of", large}
		}
		return nil
	})
}

// du is what a folder's files take, and the largest of them.
func du(t *testing.T, dir string) (size int64, largest string) {
	t.Helper()
	var most int64
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		var st unix.Stat_t
		if err != nil || unix.Lstat(path, &st) != nil {
			return nil // it has gone
		}
		size += st.Blocks * 512
		if st.Blocks > most && !e.IsDir() {
			most, largest = st.Blocks, path
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return size, largest
}

// small gives the daemon a root of a few bytes. It is no tmpfs: that takes room for what is only read of
// a sparse file, so that a clone of a template would fall with the disk full.
func small(t *testing.T, size string) func(*harness.Config) {
	return func(c *harness.Config) {
		t.Helper()
		disk := filepath.Join(t.TempDir(), "disk")
		if err := os.MkdirAll(c.Root, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, command := range [][]string{
			{"mkfs.ext4", "-q", "-m0", "-O^has_journal", disk, size},
			{"mount", "-o", "loop", disk, c.Root},
			{"rmdir", filepath.Join(c.Root, "lost+found")},
		} {
			if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%q: %v: %s", command, err, out)
			}
		}
		t.Cleanup(func() {
			if err := unix.Unmount(c.Root, 0); err != nil {
				t.Errorf("unmount the root: %v", err)
			}
		})
	}
}

func TestFullDiskWhilePulling(t *testing.T) {
	d := harness.Start(t, small(t, "32m"))
	_, err := d.TryPull(images.Large, nil)
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("got %v, want ResourceExhausted: no space left", err)
	}
	clean(t, d)
	d.Pull(images.Busybox) // for which there is room
}

// TestFullDiskWhileRunning fills the disk under a running pod. Its container gets an error or
// waits for room; the daemon and the other pod go on, and removal makes room.
func TestFullDiskWhileRunning(t *testing.T) {
	d := harness.Start(t, small(t, "800m"))
	greedy := d.RunPod().Run(images.Busybox, sleeper)
	modest := d.RunPod().Run(images.Busybox, sleeper)
	leave(t, d.Config.Root, 100<<20)
	// The guest takes what is written into its memory first, as any kernel does: who wants to know asks.
	fill, err := greedy.TryExec(120, "dd", "if=/dev/zero", "of=/fill", "bs=1M", "count=400", "conv=fsync")
	if err != nil || fill.ExitCode == 0 || !strings.Contains(string(fill.Stderr), "error") && !strings.Contains(string(fill.Stderr), "space") {
		t.Errorf("400 MB in 100: %v, %v", fill, err)
	}
	if out := greedy.Exec("echo", "afloat"); out != "afloat\n" {
		t.Errorf("the pod that filled the disk: got %q", out)
	}
	if out := modest.Exec("echo", "afloat"); out != "afloat\n" {
		t.Errorf("the other pod: got %q", out)
	}
	d.Crictl("pods")
	greedy.Pod.Remove()
	d.RunPod().Run(images.Busybox, sleeper).Exec("true")
}

// leave takes room until that much is left, in bytes.
func leave(t *testing.T, dir string, left int64) {
	t.Helper()
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	t.Cleanup(func() { os.Remove(f.Name()) }) // before the daemon's folder is looked at
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(fs.Bavail)*fs.Bsize-left); err != nil {
		t.Fatal(err)
	}
}

// TestNoSpaceForTemplate has a disk on which a template's memory does not fit: pods are booted cold, the
// log says why, and nothing is left of the attempt.
func TestNoSpaceForTemplate(t *testing.T) {
	d := harness.Start(t, small(t, "256m"))
	d.RunPod().Run(images.Busybox, sleeper).Exec("true")
	has(t, d.Log(), "pod is booted cold", "make template", "MiB free", "free some")
	left, err := filepath.Glob(filepath.Join(d.Config.Root, "templates", "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
