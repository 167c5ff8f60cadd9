package kubelet

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// waitLimit bounds every wait. An emulated machine is slow, and the kubelet retries at its own pace.
const waitLimit = 4 * time.Minute

// pod is what the kubelet says of a pod, as far as the test looks.
type pod struct {
	Metadata struct{ Name, Namespace, UID string }
	Status   struct {
		Phase, PodIP                             string
		Conditions                               []struct{ Type, Status string }
		ContainerStatuses, InitContainerStatuses []container
	}
}

type container struct {
	Name, ContainerID string
	Ready             bool
	RestartCount      int
	State, LastState  state
	Resources         struct{ Limits map[string]string }
}

type state struct {
	Running    *struct{ StartedAt time.Time }
	Waiting    *struct{ Reason, Message string }
	Terminated *struct {
		ExitCode              int
		Reason, Message       string
		StartedAt, FinishedAt time.Time
	}
}

// id is the container's, as the CRI has it.
func (c container) id() string {
	_, id, _ := strings.Cut(c.ContainerID, "://")
	return id
}

func (p pod) container(name string) container {
	for _, c := range append(p.Status.ContainerStatuses, p.Status.InitContainerStatuses...) {
		if c.Name == name {
			return c
		}
	}
	return container{}
}

// is tells whether a condition of the pod is true.
func (p pod) is(condition string) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == condition {
			return c.Status == "True"
		}
	}
	return false
}

// logFile is where the kubelet has a container's log.
func (p pod) logFile(name string) string {
	dir := strings.Join([]string{p.Metadata.Namespace, p.Metadata.Name, p.Metadata.UID}, "_")
	return filepath.Join(podLogs, dir, name, fmt.Sprintf("%d.log", p.container(name).RestartCount))
}

// client speaks to the kubelet, whose certificate is its own.
var client = &http.Client{
	Timeout:   time.Minute,
	Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}},
}

func call(method, path string) ([]byte, error) {
	request, err := http.NewRequest(method, "https://127.0.0.1:10250"+path, nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %.500s", path, response.Status, data)
	}
	return data, err
}

// read gets a JSON document from the kubelet.
func read(path string, into any) error {
	data, err := call(http.MethodGet, path)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, into)
}

// pods are those the kubelet knows.
func pods() ([]pod, error) {
	var list struct{ Items []pod }
	err := read("/pods", &list)
	return list.Items, err
}

// run has the kubelet run a command in a container. Its words are split at spaces.
func (m *machine) run(name, container, command string) (string, error) {
	path := fmt.Sprintf("/run/default/%s-%s/%s?cmd=%s", name, m.name, container, url.QueryEscape(command))
	out, err := call(http.MethodPost, path)
	return string(out), err
}

// apply gives the kubelet a static pod. It appears under another name and then at once, as the
// kubelet watches the folder.
func (m *machine) apply(t *testing.T, name, manifest string) {
	t.Helper()
	hidden, path := filepath.Join(m.manifests, "."+name), filepath.Join(m.manifests, name+".yaml")
	if err := errors.Join(os.WriteFile(hidden, []byte(manifest), 0o644), os.Rename(hidden, path)); err != nil {
		t.Fatal(err)
	}
}

// remove takes a static pod away and waits until the kubelet has forgotten it.
func (m *machine) remove(t *testing.T, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(m.manifests, name+".yaml")); err != nil {
		t.Fatal(err)
	}
	eventually(t, name+" is gone", func() error {
		all, err := pods()
		if err != nil {
			return err
		}
		for _, p := range all {
			if p.Metadata.Name == name+"-"+m.name {
				return fmt.Errorf("it is %+v", p.Status)
			}
		}
		return nil
	})
}

// await waits until a pod is as wanted, and returns it.
func (m *machine) await(t *testing.T, what, name string, wanted func(pod) bool) pod {
	t.Helper()
	var found pod
	eventually(t, what, func() error {
		all, err := pods()
		if err != nil {
			return err
		}
		for _, p := range all {
			if p.Metadata.Name != name+"-"+m.name {
				continue
			}
			if wanted(p) {
				found = p
				return nil
			}
			text, _ := json.Marshal(p.Status)
			return fmt.Errorf("it is %s", text)
		}
		return fmt.Errorf("there is no %s", name)
	})
	return found
}

func ready(p pod) bool { return p.is("Ready") }

// eventually waits for what no event tells of, and says how long it took.
func eventually(t *testing.T, what string, condition func() error) {
	t.Helper()
	begin := time.Now()
	for {
		err := condition()
		if err == nil {
			t.Logf("%6.1f s: %s", time.Since(begin).Seconds(), what)
			return
		}
		if time.Since(begin) > waitLimit {
			t.Fatalf("%s: not within %v: %v", what, waitLimit, err)
		}
		time.Sleep(250 * time.Millisecond)
	}
}
