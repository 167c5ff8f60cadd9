package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func testAttach(t *testing.T, d *harness.Daemon) {
	c := d.RunPod().Run(images.Busybox, harness.Shell("while read l; do echo got $l; echo also $l >&2; done; echo input ended"), func(c *runtimeapi.ContainerConfig) {
		c.Stdin, c.StdinOnce = true, true
	})
	cmd := d.CrictlCommand(t.Context(), "attach", "--stdin", c.ID)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	for _, word := range []string{"one", "two"} {
		if _, err := fmt.Fprintln(stdin, word); err != nil {
			t.Fatal(err)
		}
		if !lines.Scan() || lines.Text() != "got "+word {
			t.Fatalf("got %q, %v", lines.Text(), lines.Err())
		}
	}
	// The end of the input ends the container, since its input is open only once.
	if err := stdin.Close(); err != nil {
		t.Fatal(err)
	}
	if s := c.Wait(); s.ExitCode != 0 {
		t.Errorf("exit code %d", s.ExitCode)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("attach ended with %v", err)
	}
	if out := c.Output("stdout"); out != "got one\ngot two\ninput ended\n" {
		t.Errorf("the log has %q", out)
	}
	if out := c.Output("stderr"); out != "also one\nalso two\n" {
		t.Errorf("the log has %q of stderr", out)
	}
}

// testPortForward reaches a server that listens on the pod's loopback only.
func testPortForward(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod()
	c := pod.Run(images.Busybox, harness.Shell("mkdir /www; echo deep > /www/index.html; exec httpd -f -p 127.0.0.1:8080 -h /www"))
	harness.Eventually(t, "the server is up", func() error {
		r, err := c.TryExec(10, "wget", "-q", "-O-", "http://127.0.0.1:8080/")
		if err == nil && r.ExitCode != 0 {
			err = missing{"deep", string(r.Stderr)}
		}
		return err
	})
	t.Run("one after the other", func(t *testing.T) {
		forward(t, d, pod.ID, "18080:8080")
		for range 5 {
			if body, err := page("http://127.0.0.1:18080/"); err != nil || body != "deep\n" {
				t.Errorf("got %q, %v", body, err)
			}
		}
	})
	t.Run("many at once", func(t *testing.T) {
		forward(t, d, pod.ID, "18082:8080")
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if body, err := page("http://127.0.0.1:18082/"); err != nil || body != "deep\n" {
					t.Errorf("got %q, %v", body, err)
				}
			})
		}
		wg.Wait()
	})
	t.Run("nobody listens", func(t *testing.T) {
		forward(t, d, pod.ID, "18081:81")
		if body, err := page("http://127.0.0.1:18081/"); err == nil {
			t.Errorf("got %q", body)
		}
	})
}

// forward runs crictl port-forward until the test ends; it returns when it listens.
func forward(t *testing.T, d *harness.Daemon, pod, ports string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := d.CrictlCommand(ctx, "port-forward", pod, ports)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		err := cmd.Wait()
		if t.Failed() {
			t.Logf("crictl port-forward: %v\n%s", err, stderr.String())
		}
	})
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "Forwarding from") {
			go func() {
				for lines.Scan() { // so that it never blocks on its output
				}
			}()
			return
		}
	}
	t.Fatalf("crictl port-forward ended: %v", lines.Err())
}

func page(url string) (string, error) {
	response, err := http.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return string(body), err
}

func testNetwork(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod(func(c *runtimeapi.PodSandboxConfig) {
		c.Hostname = "diver"
		c.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"10.9.8.7"}, Searches: []string{"deep.test"}, Options: []string{"ndots:3"}}
	})
	pod.Run(images.Nginx, nil)
	network := pod.Status().Network
	if network.GetIp() == "" || len(network.AdditionalIps) != 1 {
		t.Fatalf("got %v, want an IPv4 and an IPv6 address", network)
	}
	for _, host := range []string{network.Ip, "[" + network.AdditionalIps[0].Ip + "]"} {
		harness.Eventually(t, host+" serves", func() error {
			body, err := page("http://" + host + "/")
			if err == nil && !strings.Contains(body, "Welcome to nginx!") {
				err = missing{"Welcome", body}
			}
			return err
		})
	}
	other := d.RunPod().Run(images.Busybox, sleeper)
	has(t, other.Exec("wget", "-q", "-O-", "http://"+network.Ip+"/"), "Welcome to nginx!")
	if otherIP := other.Pod.Status().Network.GetIp(); otherIP == network.Ip {
		t.Errorf("two pods have the address %s", otherIP)
	}
	shell := pod.Run(images.Busybox, sleeper)
	if out := shell.Exec("hostname"); out != "diver\n" {
		t.Errorf("hostname: got %q", out)
	}
	if out := shell.Exec("cat", "/etc/resolv.conf"); out != "nameserver 10.9.8.7\nsearch deep.test\noptions ndots:3\n" && out != "search deep.test\nnameserver 10.9.8.7\noptions ndots:3\n" {
		t.Errorf("resolv.conf: got %q", out)
	}
	// The VM's interface is the veth's: its address, its hardware address, its MTU.
	has(t, shell.Exec("ip", "addr", "show", "eth0"), network.Ip+"/24", "mtu 1500")
	has(t, shell.Exec("ip", "route"), "default via 10.213.")
	// Who is not root listens on any port, without capabilities, and may ping. (Busybox's own ping wants to be root.)
	user := pod.Run(images.Busybox, harness.Shell("httpd -f -p 443 -h /etc"), func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{
			RunAsUser: &runtimeapi.Int64Value{Value: 1000}, Capabilities: &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}, NoNewPrivs: true,
		}
	})
	harness.Eventually(t, "a port below 1024 serves", func() error {
		_, err := page("http://" + network.Ip + ":443/hostname")
		return err
	})
	for name, want := range map[string]string{"net/ipv4/ping_group_range": "0\t2147483647\n", "net/ipv4/ip_forward": "1\n", "vm/max_map_count": "1048576\n"} {
		if out := user.Exec("cat", "/proc/sys/"+name); out != want {
			t.Errorf("%s is %q, want %q", name, out, want)
		}
	}
	// Kernel parameters hold for the cards, and for all addresses that CNI gives.
	quiet := d.RunPod(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"net.ipv6.conf.all.disable_ipv6": "1", "net.ipv4.conf.eth0.arp_ignore": "2"}
	}).Run(images.Busybox, sleeper)
	if out := quiet.Exec("ip", "-6", "addr", "show", "eth0"); out != "" {
		t.Errorf("a pod without IPv6 has %q", out)
	}
	if out := quiet.Exec("cat", "/proc/sys/net/ipv4/conf/eth0/arp_ignore"); out != "2\n" {
		t.Errorf("arp_ignore is %q", out)
	}
}

func testHostPort(t *testing.T, d *harness.Daemon) {
	pod := d.RunPod(func(c *runtimeapi.PodSandboxConfig) {
		c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 18090}}
	})
	pod.Run(images.Nginx, nil)
	harness.Eventually(t, "the host's port serves", func() error {
		_, err := page("http://127.0.0.1:18090/")
		return err
	})
	pod.Remove()
	if out, err := exec.Command("iptables-save", "-t", "nat").Output(); err != nil || strings.Contains(string(out), "18090") {
		t.Errorf("a rule is left: %v\n%s", err, out)
	}
}
