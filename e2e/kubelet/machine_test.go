package kubelet

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
	"golang.org/x/sys/unix"
)

// Where Caisson and the kubelet have their things on a machine that is theirs.
const (
	units      = "/run/systemd/system"
	caissonEtc = "/etc/caisson"
	caissonVar = "/var/lib/caisson"
	caissonRun = "/run/caisson"
	kubeletVar = "/var/lib/kubelet"
	podLogs    = "/var/log/pods"
	kubeCgroup = "/sys/fs/cgroup/kubepods.slice"
	programs   = "/usr/local/bin"
)

// machine is this machine, as an operator would set it up: Caisson by the unit, the CNI
// configuration and the places of its release, and a kubelet with nothing but static pods.
type machine struct {
	manifests string // the folder in which the kubelet looks for static pods
	name      string // the node's name
	shared    string // a directory of the node that pods see
}

// newMachine sets the machine up, and starts nothing. When the test ends, all of it is taken away.
func newMachine(t *testing.T) *machine {
	t.Helper()
	if err := suitable(); err != nil {
		t.Fatalf("%v: run make e2e-node", err)
	}
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	m := &machine{manifests: filepath.Join(dir, "manifests"), name: strings.ToLower(host), shared: filepath.Join(dir, "shared")}
	t.Cleanup(func() { m.clear(t) })
	m.installCaisson(t, dir)
	m.installKubelet(t, dir)
	systemctl(t, "daemon-reload")
	return m
}

// suitable says what keeps the test from having this machine for itself.
func suitable() error {
	if os.Getuid() != 0 {
		return errors.New("not root")
	}
	var fs unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &fs); err != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return errors.New("no cgroup v2")
	}
	if _, err := os.Stat(units); err != nil {
		return errors.New("no systemd")
	}
	for _, path := range []string{caissonEtc, caissonVar, kubeletVar} {
		if _, err := os.Stat(path); err == nil {
			return fmt.Errorf("%s exists: the test is for a machine without Caisson and kubelet", path)
		}
	}
	for _, path := range []string{harness.Bin("caissond"), harness.Guest(), harness.Images(), harness.Tool("kubelet"), harness.Tool("crictl")} {
		if _, err := os.Stat(path); err != nil {
			return err
		}
	}
	return nil
}

func (m *machine) installCaisson(t *testing.T, dir string) {
	t.Helper()
	registries := harness.SharedRegistries(t).Configure(t, dir)
	driver := os.Getenv("CAISSON_E2E_DRIVER")
	if driver == "" {
		driver = "auto"
	}
	write(t, filepath.Join(caissonEtc, "config.toml"), fmt.Sprintf(`driver = %q
guest = %q
cni.conf_dir = %q
images.registries_conf = %q
images.policy = %q
log.level = "debug"
`, driver, harness.Guest(), dir, registries.RegistriesConf, registries.Policy))
	for from, to := range map[string]string{
		"caissond.service": units, "10-caisson.conflist": dir,
	} {
		text, err := os.ReadFile(filepath.Join(harness.Top(), "deploy", from))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(to, from), string(text))
	}
	if err := os.Symlink(harness.Bin("caissond"), filepath.Join(programs, "caissond")); err != nil {
		t.Fatal(err)
	}
}

// kubeletConfig is that of a kubelet on its own. The cgroup driver is left to the runtime to say, and
// containers' figures come from it: the node's cgroups don't show what happens in a VM.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://%s/caisson.sock
staticPodPath: %s
resolvConf: %s
address: 127.0.0.1
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
featureGates: {PodAndContainerStatsFromCRI: true}
failSwapOn: false
syncFrequency: 10s
runtimeRequestTimeout: 4m
evictionHard: {memory.available: 10Mi, nodefs.available: 1%%, nodefs.inodesFree: 1%%, imagefs.available: 1%%}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
`

const kubeletUnit = `[Unit]
After=caissond.service
[Service]
ExecStart=%s --config %s --v=2
KillMode=process
Restart=always
RestartSec=1
`

// nameserver is what a pod's resolv.conf must have: the kubelet takes it from a file of the test's.
const nameserver = "192.0.2.53"

func (m *machine) installKubelet(t *testing.T, dir string) {
	t.Helper()
	config, resolv := filepath.Join(dir, "kubelet.yaml"), filepath.Join(dir, "resolv.conf")
	write(t, resolv, "nameserver "+nameserver+"\n")
	write(t, config, fmt.Sprintf(kubeletConfig, caissonRun, m.manifests, resolv))
	write(t, filepath.Join(units, "kubelet.service"), fmt.Sprintf(kubeletUnit, harness.Tool("kubelet"), config))
	if err := os.MkdirAll(m.manifests, 0o755); err != nil {
		t.Fatal(err)
	}
}

// start starts a unit and returns when systemd has it started.
func (m *machine) start(t *testing.T, unit string) {
	t.Helper()
	systemctl(t, "start", unit)
}

// clear stops the units and takes away what they and the test have made. The units' logs are shown
// when the test has failed, which is also when pods are left.
func (m *machine) clear(t *testing.T) {
	if out, err := exec.Command("systemctl", "stop", "kubelet.service").CombinedOutput(); err != nil {
		t.Logf("stop the kubelet: %v: %s", err, out)
	}
	if t.Failed() {
		if _, err := tryCrictl("rmp", "--force", "--all"); err != nil {
			t.Logf("remove pods: %v", err)
		}
		volumes, _ := filepath.Glob(kubeletVar + "/pods/*/volumes/*/*")
		for _, volume := range volumes {
			_ = unix.Unmount(volume, unix.MNT_DETACH) // most are no mounts
		}
	}
	for _, unit := range []string{"kubelet.service", "caissond.service"} {
		if out, err := exec.Command("systemctl", "stop", unit).CombinedOutput(); err != nil {
			t.Logf("stop %s: %v: %s", unit, err, out)
		}
		if t.Failed() {
			out, _ := exec.Command("journalctl", "--no-pager", "--output=cat", "--lines=400", "--unit="+unit).CombinedOutput()
			t.Logf("the end of %s's log:\n%s", unit, out)
		}
	}
	for _, path := range []string{caissonEtc, caissonVar, caissonRun, kubeletVar, podLogs,
		filepath.Join(units, "caissond.service"), filepath.Join(units, "kubelet.service"), filepath.Join(programs, "caissond")} {
		if err := os.RemoveAll(path); err != nil {
			t.Errorf("clean up: %v", err)
		}
	}
	systemctl(t, "daemon-reload")
}

func systemctl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("systemctl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("systemctl %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// crictl runs crictl against Caisson.
func crictl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := tryCrictl(args...)
	if err != nil {
		t.Fatalf("crictl %s: %v", strings.Join(args, " "), err)
	}
	return out
}

func tryCrictl(args ...string) (string, error) {
	endpoint := "unix://" + caissonRun + "/caisson.sock"
	flags := []string{"--config", os.DevNull, "--runtime-endpoint", endpoint, "--image-endpoint", endpoint, "--timeout", "120s"}
	cmd := exec.Command(harness.Tool("crictl"), append(flags, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return string(out), err
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}
