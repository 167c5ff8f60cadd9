package network

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// script installs a plugin of that name: a shell script that first logs its command, container id
// and namespace.
func (n *node) script(t *testing.T, name, body string) {
	t.Helper()
	n.write(t, "bin/"+name, "#!/bin/sh\necho \"$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS\" >>"+n.dir+"/calls\n"+body, 0o755)
}

// calls are the commands the scripts were called with, in order.
func (n *node) calls(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(n.dir, "calls"))
	if err != nil {
		t.Fatal(err)
	}
	var commands []string
	for line := range strings.Lines(string(data)) {
		commands = append(commands, strings.Fields(line)[0])
	}
	return strings.Join(commands, " ")
}

// newScriptNode has Debian's bridge and behind it the script.
func newScriptNode(t *testing.T, version, body string) *node {
	t.Helper()
	n := newNode(t)
	n.configure(t, map[string]any{"cniVersion": version, "name": "scripted", "plugins": []map[string]any{
		{"type": "scripted", "note": "kept"},
	}})
	n.script(t, "scripted", body)
	return n
}

func TestPluginThatFails(t *testing.T) {
	for name, c := range map[string]struct{ body, want string }{
		"in the CNI's words": {
			`[ $CNI_COMMAND = DEL ] && exit 0; echo '{"code": 11, "msg": "no more addresses", "details": "10.9.0.0/24 is full"}'; exit 1`,
			"no more addresses",
		},
		"in its own words": {`[ $CNI_COMMAND = DEL ] && exit 0; echo "panic: nil map" >&2; exit 2`, "panic: nil map"},
		"without a word":   {`[ $CNI_COMMAND = DEL ] && exit 0; exit 3`, "exit status 3"},
		"with nonsense":    {`[ $CNI_COMMAND = DEL ] && exit 0; echo '<html>'; exit 1`, "<html>"},
		"claiming success": {`[ $CNI_COMMAND = DEL ] && exit 0; echo '{"cniVersion": "1.0.0"}'`, "eth0"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newScriptNode(t, "1.0.0", c.body)
			_, err := n.Setup(t.Context(), n.pod(1))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("setup: %v, want %q in it", err, c.want)
			}
			if !errdefs.IsUnavailable(err) {
				t.Errorf("setup: %v, want unavailable", err)
			}
			if got := n.calls(t); got != "ADD DEL" {
				t.Errorf("called %s, want ADD DEL", got)
			}
			n.wantNothingLeft(t)
		})
	}
}

// The address that the first plugin took goes back when the second fails.
func TestSecondPluginFails(t *testing.T) {
	n := newBridgeNode(t, map[string]any{"type": "scripted"})
	n.script(t, "scripted", `[ $CNI_COMMAND = DEL ] && exit 0; exit 1`)
	if _, err := n.Setup(t.Context(), n.pod(1)); err == nil || !strings.Contains(err.Error(), "bin/scripted, ADD") {
		t.Errorf("setup: %v, want the plugin's path and command in it", err)
	}
	n.wantNothingLeft(t)
}

func TestPluginThatHangs(t *testing.T) {
	n := newScriptNode(t, "1.0.0", `[ $CNI_COMMAND = DEL ] && exit 0
echo waiting for the API server >&2
sleep 600 & echo $! >$(dirname $0)/../child; wait`)
	n.o.Timeout = 300 * time.Millisecond
	n.CNI = New(n.o)
	begin := time.Now()
	_, err := n.Setup(t.Context(), n.pod(1))
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "waiting for the API server") {
		t.Errorf("setup: %v, want deadline exceeded and the plugin's stderr", err)
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("setup took %v", took)
	}
	if got := n.calls(t); got != "ADD DEL" {
		t.Errorf("called %s, want ADD DEL", got)
	}
	n.wantChildGone(t)
}

func TestSetupCancelled(t *testing.T) {
	n := newScriptNode(t, "1.0.0", `[ $CNI_COMMAND = DEL ] && exit 0
sleep 600 & echo $! >$(dirname $0)/../child; wait`)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for { // until the plugin runs
			if _, err := os.Stat(filepath.Join(n.dir, "child")); err == nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		cancel()
	}()
	if _, err := n.Setup(ctx, n.pod(1)); !errors.Is(err, context.Canceled) {
		t.Errorf("setup: %v, want cancelled", err)
	}
	n.wantChildGone(t)
	n.wantNothingLeft(t)
}

// wantChildGone expects the process that the script started to be dead.
func (n *node) wantChildGone(t *testing.T) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(n.dir, "child"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); unix.Kill(pid, 0) == nil; time.Sleep(10 * time.Millisecond) {
		stat, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if strings.Contains(string(stat), ") Z ") {
			return // dead; the machine's init has yet to reap it
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d of the plugin still runs", pid)
		}
	}
}

// A DEL that fails leaves what the next one needs, and says so.
func TestTeardownFailsAndIsRetried(t *testing.T) {
	n := newBridgeNode(t, map[string]any{"type": "scripted"})
	n.script(t, "scripted", `[ $CNI_COMMAND = ADD ] && exec sed 's/.*"prevResult"://; s/,"type":"scripted".*//' && exit 0
test -e $(dirname $0)/../repaired`)
	a, err := n.Setup(t.Context(), n.pod(1))
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Teardown(t.Context(), Pod{ID: n.pod(1).ID}); !errdefs.IsUnavailable(err) {
		t.Errorf("teardown: %v, want unavailable", err)
	}
	if !isNetNS(a.NetNS) {
		t.Error("the namespace went before DEL succeeded")
	}
	n.write(t, "repaired", "", 0o644)
	n.teardown(t, n.pod(1).ID)
}

func TestPluginIsGivenThePod(t *testing.T) {
	n := newNode(t)
	n.configure(t, map[string]any{"cniVersion": "1.0.0", "name": "scripted", "plugins": []map[string]any{{
		"type": "scripted",
		"capabilities": map[string]bool{
			capPortMappings: true, capBandwidth: true, capDNS: true, capAnnotations: true, "ips": true,
		},
	}}})
	n.script(t, "scripted", `[ $CNI_COMMAND = DEL ] && exit 0; echo "$CNI_ARGS $CNI_IFNAME $CNI_PATH" >$(dirname $0)/../env; cat >$(dirname $0)/../stdin; exit 1`)
	p := n.pod(1)
	p.PortMappings = []PortMapping{{Protocol: "TCP", ContainerPort: 80, HostPort: 8080, HostIP: "127.0.0.1"}}
	p.Annotations = map[string]string{ingressAnnotation: "10M"}
	p.DNS = DNS{Servers: []string{"192.0.2.53"}, Searches: []string{"svc.local"}, Options: []string{"ndots:5"}}
	if _, err := n.Setup(t.Context(), p); err == nil {
		t.Fatal("the script succeeded")
	}
	env, err := os.ReadFile(filepath.Join(n.dir, "env"))
	if err != nil {
		t.Fatal(err)
	}
	want := "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + p.Name + ";K8S_POD_INFRA_CONTAINER_ID=" + p.ID +
		";K8S_POD_UID=" + p.UID + " eth0 " + strings.Join(n.o.BinDirs, ":") + "\n"
	if string(env) != want {
		t.Errorf("environment %s, want %s", env, want)
	}
	data, err := os.ReadFile(filepath.Join(n.dir, "stdin"))
	if err != nil {
		t.Fatal(err)
	}
	var conf struct {
		RuntimeConfig map[string]any `json:"runtimeConfig"`
	}
	if err := json.Unmarshal(data, &conf); err != nil {
		t.Fatal(err)
	}
	wantJSON(t, conf.RuntimeConfig, map[string]any{
		"portMappings": []any{map[string]any{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}},
		"bandwidth":    map[string]any{"ingressRate": 10000000, "ingressBurst": 1 << 20},
		"dns":          map[string]any{"servers": p.DNS.Servers, "searches": p.DNS.Searches, "options": p.DNS.Options},
		capAnnotations: p.Annotations,
	})
}

func wantJSON(t *testing.T, got, want any) {
	t.Helper()
	g, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	w, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	if string(g) != string(w) {
		t.Errorf("got\n%s, want\n%s", g, w)
	}
}

func TestOutputIsBounded(t *testing.T) {
	n := newScriptNode(t, "1.0.0", `[ $CNI_COMMAND = DEL ] && exit 0; exec yes`)
	if _, err := n.Setup(t.Context(), n.pod(1)); err == nil || len(err.Error()) > 16<<10 {
		t.Errorf("setup: %.200v, want a short error", err)
	}
}
