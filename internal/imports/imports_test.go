// Package imports holds the directions in which the rooms may import one another; see
// docs/ARCHITECTURE.md.
package imports

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/caisson-vm/caisson/"

// rules: what a room (by the longest prefix) may import of the module's other rooms. A room may
// always import what is below itself.
var rules = map[string][]string{
	"cmd":               {"server", "imagestore", "podvm", "network", "metrics", "internal"},
	"cmd/caisson-agent": {"podvm/agent", "podvm/agent/guest", "podvm/agent/guest/boot", "podvm/vmm", "internal"},
	"server":            {"podvm", "podvm/agent", "imagestore"},
	"metrics":           {"podvm", "imagestore"},
	"podvm":             {"imagestore", "network", "internal"},
	"podvm/agent":       {"internal"},
	"podvm/agent/guest": {"podvm/agent", "podvm/vmm", "internal"},
	"podvm/guestimage":  {"internal"},
	"podvm/template":    {"podvm/vmm", "podvm/vmm/process", "internal"},
	"podvm/share":       {"podvm/agent", "podvm/vmm", "podvm/vmm/process", "internal"},
	"podvm/state":       {"internal"},
	"podvm/vmm":         {"internal"},
	"podvm/vmm/qemu":    {"podvm/vmm", "podvm/vmm/machine", "podvm/vmm/process", "podvm/vmm/tail", "internal"},
	"podvm/vmm/cloudhv": {"podvm/vmm", "podvm/vmm/machine", "podvm/vmm/process", "podvm/vmm/tail", "internal"},
	"podvm/vmm/machine": {"podvm/vmm", "podvm/vmm/process", "podvm/vmm/tail"},
	"podvm/vmm/process": {"internal"},
	"podvm/vmm/tail":    {},
	"podvm/vmm/vmmtest": {"podvm/vmm", "podvm/vmm/process", "podvm/agent", "podvm/guestimage", "imagestore/erofs", "internal"},
	"imagestore":        {"internal"},
	"network":           {"internal"},
	"internal":          {},
	"e2e":               {},
}

// exact are rooms that may be imported only as such, not what is below them.
var exact = map[string]bool{"podvm": true, "podvm/vmm": true, "podvm/agent": true}

// ends are where a library's words end: packages that only these rooms may import.
var ends = map[string][]string{
	"k8s.io/cri-api":                      {"server", "e2e"},
	"github.com/vishvananda/netlink":      {"network", "podvm/agent/guest", "e2e", "podvm/vmm/vmmtest"},
	"github.com/containers/":              {"imagestore", "cmd/caissond", "e2e"},
	"github.com/containernetworking/":     {"network"},
	"github.com/prometheus/client_golang": {"metrics", "e2e"},
	"github.com/hanwen/go-fuse/":          {"podvm/share"},
	"github.com/hashicorp/yamux":          {"internal/serialmux"},
}

// seeded take their randomness from Go's runtime, which in every clone of a template goes on from the
// same state: what runs in a guest takes it from the kernel, which is given entropy of its own.
var seeded = []string{"math/rand", "math/rand/v2", "hash/maphash"}

// inGuest are the rooms that the agent is made of.
var inGuest = []string{"cmd/caisson-agent", "podvm/agent", "internal"}

type pack struct {
	ImportPath string
	Imports    []string
}

func packages(t *testing.T) []pack {
	t.Helper()
	out, err := exec.Command("go", "list", "-tags=containers_image_openpgp", "-json=ImportPath,Imports", module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []pack
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pack
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// room is the longest of the names that the path is in.
func room(path string) string {
	var longest string
	for name := range rules {
		if (path == name || strings.HasPrefix(path, name+"/")) && len(name) > len(longest) {
			longest = name
		}
	}
	return longest
}

func allowed(from, to string) bool {
	if to == from || strings.HasPrefix(to, from+"/") {
		return true
	}
	return slices.ContainsFunc(rules[from], func(name string) bool {
		return to == name || strings.HasPrefix(to, name+"/") && (!exact[name] || from == "cmd")
	})
}

func TestDirections(t *testing.T) {
	all := packages(t)
	if len(all) < 20 {
		t.Fatalf("only %d packages found", len(all))
	}
	for _, p := range all {
		path := strings.TrimPrefix(p.ImportPath, module)
		if strings.HasPrefix(path, "build/") {
			continue // what the Makefile made
		}
		from := room(path)
		if from == "" {
			t.Errorf("%s is in no room; name it in docs/ARCHITECTURE.md and here", path)
			continue
		}
		for _, i := range p.Imports {
			if to, ours := strings.CutPrefix(i, module); ours && !allowed(from, to) {
				t.Errorf("%s imports %s", path, to)
			}
			for library, rooms := range ends {
				if strings.HasPrefix(i, library) && !slices.ContainsFunc(rooms, func(r string) bool { return path == r || strings.HasPrefix(path, r+"/") }) {
					t.Errorf("%s imports %s, whose words end in %v", path, i, rooms)
				}
			}
		}
	}
}

func TestGuestsHaveRandomnessOfTheirOwn(t *testing.T) {
	for _, p := range packages(t) {
		path := strings.TrimPrefix(p.ImportPath, module)
		if !slices.ContainsFunc(inGuest, func(r string) bool { return path == r || strings.HasPrefix(path, r+"/") }) {
			continue
		}
		for _, i := range p.Imports {
			if slices.Contains(seeded, i) {
				t.Errorf("%s imports %s: use crypto/rand", path, i)
			}
		}
	}
}
