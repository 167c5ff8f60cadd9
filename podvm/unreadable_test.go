package podvm

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// rewrite changes the record in a file, of which next is the next version.
func rewrite(t *testing.T, path string, version int, change func(record map[string]any)) (content string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var whole map[string]any
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&whole); err != nil {
		t.Fatal(err)
	}
	whole["version"] = version
	change(whole["record"].(map[string]any))
	if data, err = json.Marshal(whole); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// addFields is what a newer daemon has written.
func addFields(record map[string]any) {
	record["Later"] = "x"
	for _, name := range []string{"Config", "VM", "Network", "User"} {
		if part, ok := record[name].(map[string]any); ok {
			part["Later"] = map[string]any{"Deep": 1}
			if security, ok := part["Security"].(map[string]any); ok {
				security["Later"] = true
			}
		}
	}
}

// TestRecoverNewerFields rolls the daemon back from one whose records have fields more.
func TestRecoverNewerFields(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	c := n.running(p, containerConfig("main"))
	n.restart(func() {
		rewrite(t, n.layout.record(p.ID()), 1, addFields)
		rewrite(t, n.layout.container(p.ID(), c.ID()), 1, addFields)
	})
	q := n.again(p.ID())
	if s := q.Status(); s.State != Ready || s.Config.Name != "web" {
		t.Errorf("the pod is %+v", s)
	}
	d, err := n.Manager.Container(c.ID())
	if err != nil {
		t.Fatal(err)
	}
	if s := d.Status(); s.State != Running || s.Config.Name != "main" {
		t.Errorf("its container is %+v", s)
	}
	if _, err := q.Create(soon(t), containerConfig("main")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second instance: %v", err)
	}
	if again := n.pod(podConfig("web")); again != q {
		t.Error("a second instance of the pod")
	}
}

// TestRecoverUnreadable keeps what it does not understand, until somebody asks for its removal. A pod that nobody
// can know again has no VM any more by then.
func TestRecoverUnreadable(t *testing.T) {
	for name, content := range map[string]string{
		"garbage": "\x00garbage", "newer version": `{"version":99,"record":{}}`, "unknown field": `{"version":1,"record":{"Fancy":1}}`,
		"nothing": "", "another's": fmt.Sprintf(`{"version":1,"record":{"ID":%q,"Stage":"ready"}}`, strings.Repeat("a", 64)),
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			p := n.pod(podConfig("web"))
			n.running(p, containerConfig("main"))
			path := n.layout.record(p.ID())
			n.restart(func() {
				if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			})
			n.until("its VM is ended", func() bool { return len(n.driver.VMs()) == 0 })
			q := n.again(p.ID())
			if s := q.Status(); s.State != NotReady || s.Reason != "Unreadable" || s.Message == "" || s.Config.Name != "unreadable" {
				t.Errorf("got %+v", s)
			}
			if len(n.network.pods()) != 1 {
				t.Error("more than its VM was taken back")
			}
			if data, err := os.ReadFile(path); err != nil || string(data) != content {
				t.Errorf("the record became %q, %v", data, err)
			}
			if again := n.pod(podConfig("web")); len(n.driver.VMs()) != 1 || again == q {
				t.Errorf("%d VMs of the pod", len(n.driver.VMs()))
			} else if err := again.Remove(soon(t)); err != nil {
				t.Error(err)
			}
			if err := q.Remove(soon(t)); err != nil {
				t.Error(err)
			}
			n.nothingLeft()
		})
	}
}

// TestRecoverKnownAgain: a pod whose record is not for this daemon to read is known by the kubelet, which stops it
// before it starts another one.
func TestRecoverKnownAgain(t *testing.T) {
	n := newNode(t)
	config := podConfig("web")
	config.Attempt, config.Labels = 3, map[string]string{"app": "web"}
	p := n.pod(config)
	before, path := p.Status(), n.layout.record(p.ID())
	var content string
	n.restart(func() { content = rewrite(t, path, 99, func(r map[string]any) { r["VM"] = "elsewhere" }) })
	q := n.again(p.ID())
	s := q.Status()
	if s.State != NotReady || s.Reason != "Unreadable" || !strings.Contains(s.Message, "version 99") {
		t.Errorf("got %+v", s)
	}
	if c := s.Config; nameOf(c) != nameOf(config) || c.Labels["app"] != "web" || !s.Created.Equal(before.Created) {
		t.Errorf("it is %+v of %v", c, s.Created)
	}
	if _, err := n.Run(soon(t), config); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second instance: %v", err)
	}
	if err := q.Stop(soon(t)); err != nil {
		t.Fatal(err)
	}
	n.until("its VM is ended", func() bool { return len(n.driver.VMs()) == 0 })
	if data, err := os.ReadFile(path); err != nil || string(data) != content {
		t.Errorf("the record became %q, %v", data, err)
	}
	if err := q.Remove(soon(t)); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
}

// TestRecoverUnreadableContainer ends a container of which nobody knows what it is, and leaves the pod and its
// other containers alone.
func TestRecoverUnreadableContainer(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	bad, good := n.running(p, containerConfig("bad")), n.running(p, containerConfig("good"))
	path := n.layout.container(p.ID(), bad.ID())
	damage := func() {
		if err := os.WriteFile(path, []byte("garbage"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a := n.agentOf(p.ID())
	a.say(bad.ID(), "something")
	n.restart(damage)
	q := n.again(p.ID())
	if s := q.Status(); s.State != Ready {
		t.Errorf("the pod is %+v", s)
	}
	c, err := n.Manager.Container(good.ID())
	if err != nil || c.Status().State != Running {
		t.Errorf("the other container: %v", err)
	}
	if data, _ := os.ReadFile(path); string(data) != "garbage" {
		t.Error("the record was changed")
	}
	if !a.container(bad.ID()).ended {
		t.Error("what was not understood runs on")
	}
	d, err := n.Manager.Container(bad.ID())
	if err != nil {
		t.Fatal(err)
	}
	if s := d.Status(); s.State != Exited || s.Config.Name != "unreadable" || s.Config.ImageName == "" || s.Message == "" || s.Created.IsZero() {
		t.Errorf("it is %+v", s)
	}
	n.running(q, containerConfig("bad"))
	if err := d.Remove(soon(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) || a.container(bad.ID()) != nil {
		t.Errorf("it is not removed: %v", err)
	}
}

// TestRecoverUnreadableOfSilentGuest: where a guest can't be told to end a container of which nobody knows what it
// is, the pod gets no other one before it can.
func TestRecoverUnreadableOfSilentGuest(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	bad := n.running(p, containerConfig("bad"))
	a := n.agentOf(p.ID())
	a.do(func() { a.fail["Signal"] = errdefs.ErrUnavailable })
	n.restart(func() {
		if err := os.WriteFile(n.layout.container(p.ID(), bad.ID()), []byte("garbage"), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	q := n.again(p.ID())
	if _, err := q.Create(soon(t), containerConfig("bad")); err == nil {
		t.Fatal("a second instance")
	}
	a.do(func() { delete(a.fail, "Signal") })
	n.running(q, containerConfig("bad"))
	if !a.container(bad.ID()).ended {
		t.Error("there are two")
	}
}

// TestRecoverKnownContainer: a container whose record is not for this daemon to read, and says what it is, can be
// stopped as the kubelet does, and there is no second one before.
func TestRecoverKnownContainer(t *testing.T) {
	n := newNode(t)
	config := podConfig("web")
	config.LogDir = t.TempDir()
	p := n.pod(config)
	main := containerConfig("main")
	main.Attempt, main.Labels, main.Annotations = 2, map[string]string{"app": "web"}, map[string]string{"hash": "1"}
	c := n.running(p, main)
	before, path := c.Status(), n.layout.container(p.ID(), c.ID())
	var content string
	n.restart(func() { content = rewrite(t, path, 99, func(r map[string]any) { r["State"] = 7 }) })
	q := n.again(p.ID())
	d, err := n.Manager.Container(c.ID())
	if err != nil {
		t.Fatal(err)
	}
	s := d.Status()
	if s.State != Unknown || s.Config.Name != "main" || s.Config.Attempt != 2 || s.Config.Labels["app"] != "web" || s.Config.Annotations["hash"] != "1" {
		t.Errorf("it is %+v", s)
	}
	if s.LogPath != before.LogPath || s.ImageRef != before.ImageRef || !s.Created.Equal(before.Created) || !s.Started.Equal(before.Started) {
		t.Errorf("it is %+v, and was %+v", s, before)
	}
	a := n.agentOf(p.ID())
	if a.container(c.ID()).ended {
		t.Error("it was ended, though the kubelet knows it")
	}
	if _, err := q.Create(soon(t), main); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second instance: %v", err)
	}
	main.Attempt++
	if _, err := q.Create(soon(t), main); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a second instance: %v", err)
	}
	n.running(q, containerConfig("other"))
	if err := d.Stop(soon(t), 10*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if s := d.Status(); s.State != Exited || s.Message == "" {
		t.Errorf("it is %+v", s)
	}
	if first := a.container(c.ID()).signals[0]; first != int32(unix.SIGUSR1) { // the image's
		t.Errorf("it was stopped by signal %d", first)
	}
	n.running(q, main)
	if data, _ := os.ReadFile(path); string(data) != content {
		t.Error("the record was changed")
	}
	if err := d.Remove(soon(t)); err != nil {
		t.Fatal(err)
	}
}
