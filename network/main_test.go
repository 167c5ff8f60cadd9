package network

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestMain runs the tests once more in a network and mount namespace of their own, so that no
// bridge, rule or mount of theirs is ever the machine's, however they end.
func TestMain(m *testing.M) {
	const inside = "CAISSON_NETWORK_TEST"
	if os.Getenv(inside) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL,
		}
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "tests of package network:", err)
			os.Exit(1)
		}
		return
	}
	if work := os.Getenv(daemonOf); work != "" {
		panic(beDaemon(work))
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		panic(err)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// node is a CNI with directories and a configuration of a test's own. When the test ends nothing
// of its pods may be left.
type node struct {
	*CNI
	index   int32
	dir     string
	bridge  string
	gateway string // the bridge's IPv4 address
	subnet4 string
	subnet6 string
}

var nodes atomic.Int32

const debianPlugins = "/usr/lib/cni"

// newNode has no configuration yet.
func newNode(t testing.TB) *node {
	t.Helper()
	i := nodes.Add(1)
	dir := t.TempDir()
	n := &node{
		index:   i,
		dir:     dir,
		bridge:  fmt.Sprintf("br-test%d", i),
		gateway: fmt.Sprintf("10.99.%d.1", i),
		subnet4: fmt.Sprintf("10.99.%d.0/24", i),
		subnet6: fmt.Sprintf("fd99:%x::/64", i),
	}
	n.CNI = New(Options{
		ConfDir: filepath.Join(dir, "net.d"), BinDirs: []string{filepath.Join(dir, "bin"), debianPlugins},
		CacheDir: filepath.Join(dir, "cache"), NetNSDir: filepath.Join(dir, "netns"),
	})
	for _, d := range []string{"net.d", "bin"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		n.wantNothingLeft(t)
		if br, err := netlink.LinkByName(n.bridge); err == nil {
			if err := netlink.LinkDel(br); err != nil {
				t.Error(err)
			}
		}
	})
	return n
}

// newBridgeNode is configured by deploy/10-caisson.conflist, on a bridge, subnets and IPAM
// directory of its own and with more plugins at its end.
func newBridgeNode(t testing.TB, more ...map[string]any) *node {
	t.Helper()
	n := newNode(t)
	data, err := os.ReadFile("../deploy/10-caisson.conflist")
	if err != nil {
		t.Fatal(err)
	}
	var conf map[string]any
	if err := json.Unmarshal(data, &conf); err != nil {
		t.Fatal(err)
	}
	plugins := conf["plugins"].([]any)
	bridge := plugins[0].(map[string]any)
	bridge["bridge"] = n.bridge
	ipam := bridge["ipam"].(map[string]any)
	ipam["dataDir"] = n.ipamDir()
	ipam["ranges"] = [][]map[string]string{{{"subnet": n.subnet4}}, {{"subnet": n.subnet6}}}
	for _, p := range more {
		plugins = append(plugins, p)
	}
	conf["plugins"] = plugins
	n.configure(t, conf)
	return n
}

func (n *node) configure(t testing.TB, conf any) {
	t.Helper()
	data, err := json.Marshal(conf)
	if err != nil {
		t.Fatal(err)
	}
	n.write(t, filepath.Join("net.d", "10-test.conflist"), string(data), 0o644)
}

func (n *node) write(t testing.TB, name, content string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(n.dir, name), []byte(content), mode); err != nil {
		t.Fatal(err)
	}
}

func (n *node) ipamDir() string { return filepath.Join(n.dir, "ipam") }

// pod is a pod with an id of its own.
func (n *node) pod(i int) Pod {
	return Pod{
		ID:   strings.Repeat(fmt.Sprintf("%04x%04x", n.index, i), 8),
		Name: fmt.Sprintf("web-%d", i), Namespace: "default", UID: fmt.Sprintf("uid-%d", i),
	}
}

func (n *node) setup(t testing.TB, p Pod) *Attachment {
	t.Helper()
	a, err := n.Setup(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (n *node) teardown(t testing.TB, id string) {
	t.Helper()
	if err := n.Teardown(t.Context(), Pod{ID: id}); err != nil {
		t.Fatal(err)
	}
}

// wantNothingLeft looks wherever a pod's network leaves traces.
func (n *node) wantNothingLeft(t testing.TB) {
	t.Helper()
	for _, dir := range []string{n.o.NetNSDir, n.recordDir(), filepath.Join(n.o.CacheDir, "results")} {
		entries, err := os.ReadDir(dir)
		if err == nil && len(entries) > 0 {
			t.Errorf("left in %s: %v", dir, entries)
		}
	}
	if addrs, _ := filepath.Glob(n.ipamDir() + "/*/[0-9a-f]*[.:]*"); len(addrs) > 0 {
		t.Errorf("addresses still reserved: %v", addrs)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), n.dir) {
		t.Errorf("a mount is left (%v)", err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		left := podInterfaces(t) // with a namespace they go in the background
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("interfaces are left: %v", left)
			break
		}
	}
	if rules := n.rules(t); rules != "" {
		t.Errorf("rules are left:\n%s", rules)
	}
}

// podInterfaces are the node's ends of pods' interfaces.
func podInterfaces(t testing.TB) (names []string) {
	t.Helper()
	links, err := net.Interfaces()
	if err != nil {
		t.Error(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Name, "veth") || strings.HasPrefix(l.Name, "bwp") {
			names = append(names, l.Name)
		}
	}
	return names
}

// rules are the chains that plugins made for single pods.
func (n *node) rules(t testing.TB) string {
	t.Helper()
	var chains []string
	for _, tool := range []string{"iptables-save", "ip6tables-save"} {
		rules, err := exec.Command(tool, "-t", "nat").CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v: %s", tool, err, rules)
		}
		for _, line := range strings.Split(string(rules), "\n") {
			if strings.HasPrefix(line, ":CNI-") && !strings.HasPrefix(line, ":CNI-HOSTPORT") {
				chains = append(chains, line)
			}
		}
	}
	return strings.Join(chains, "\n")
}

func (n *node) flushRules(t testing.TB) {
	t.Helper()
	for _, tool := range []string{"iptables", "ip6tables"} {
		for _, flag := range []string{"-F", "-X"} {
			if out, err := exec.Command(tool, "-t", "nat", flag).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", tool, err, out)
			}
		}
	}
}
