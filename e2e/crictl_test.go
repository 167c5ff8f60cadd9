package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// testCrictl is an operator's session: every step by crictl.
func testCrictl(t *testing.T, d *harness.Daemon) {
	has(t, d.Crictl("version"), "RuntimeName:  caisson", "RuntimeApiVersion:  v1")
	has(t, d.Crictl("info"), `"RuntimeReady"`, `"NetworkReady"`)
	has(t, d.Crictl("pull", images.Busybox), "Image is up to date")
	has(t, d.Crictl("images"), "docker.io/library/busybox", "1.35")
	has(t, d.Crictl("imagefsinfo"), `"usedBytes"`)

	config := d.PodConfig()
	podFile, containerFile := writeJSON(t, config), writeJSON(t, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "shell"},
		Image:    &runtimeapi.ImageSpec{Image: images.Busybox},
		Command:  harness.Shell("echo to stdout; echo to stderr >&2; exec sleep 1000"),
		LogPath:  "shell.log",
		Linux:    &runtimeapi.LinuxContainerConfig{},
	})
	pod := line(d.Crictl("runp", podFile))
	container := line(d.Crictl("create", pod, containerFile, podFile))
	has(t, d.Crictl("ps", "--all"), "Created", "shell")
	d.Crictl("start", container)
	has(t, d.Crictl("ps"), "Running", "shell", container[:13])
	has(t, d.Crictl("pods"), "Ready", config.Metadata.Name, pod[:13])
	has(t, d.Crictl("inspect", container), `"CONTAINER_RUNNING"`, images.Busybox)
	has(t, d.Crictl("inspectp", pod), `"SANDBOX_READY"`, `"ip"`)

	kernel := line(d.Crictl("exec", "--sync", container, "uname", "-r"))
	if host := hostKernel(t); kernel == host || kernel == "" {
		t.Errorf("the guest's kernel is %q, the host's %q: want two", kernel, host)
	}
	if out := d.Crictl("exec", container, "echo", "streamed"); out != "streamed\n" {
		t.Errorf("exec: got %q", out)
	}
	harness.Eventually(t, "the log has both streams", func() error {
		out, err := d.TryCrictl("logs", container)
		if err == nil && !strings.Contains(out, "to stdout") {
			return missing{"to stdout", out}
		}
		return err
	})
	d.Crictl("stats", container)
	d.Crictl("statsp", pod)
	d.Crictl("update", "--memory", "67108864", container)
	d.Crictl("stop", "--timeout", "1", container)
	has(t, d.Crictl("ps", "--all"), "Exited")
	d.Crictl("rm", container)
	d.Crictl("stopp", pod)
	has(t, d.Crictl("pods"), "NotReady")
	d.Crictl("rmp", pod)
	if out := d.Crictl("pods", "--quiet", "--id", pod); out != "" {
		t.Errorf("the pod is still there: %q", out)
	}
}

func hostKernel(t *testing.T) string {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	return unix.ByteSliceToString(u.Release[:])
}

// has fails the test for each of the texts that is missing.
func has(t *testing.T, out string, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(out, text) {
			t.Errorf("%q is missing in:\n%.4000s", text, out)
		}
	}
}

// missing is the error of a text that is not there.
type missing struct{ text, out string }

func (m missing) Error() string { return "no " + m.text + " in " + m.out }

func line(out string) string { return strings.TrimSpace(out) }

func writeJSON(t *testing.T, v any) string {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
