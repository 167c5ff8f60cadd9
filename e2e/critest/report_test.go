package critest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const report = `[{"SpecReports": [
{"LeafNodeType": "BeforeSuite", "State": "passed"},
{"ContainerHierarchyTexts": ["[k8s.io] Streaming", "runtime should support streaming interfaces"], "LeafNodeType": "It", "LeafNodeText": "runtime should support attach [Conformance]", "State": "passed"},
{"ContainerHierarchyTexts": ["[k8s.io] Streaming"], "LeafNodeType": "It", "LeafNodeText": "host network", "State": "failed", "Failure": {"Message": "not in a VM"}},
{"ContainerHierarchyTexts": ["[k8s.io] AppArmor"], "LeafNodeType": "It", "LeafNodeText": "profile", "State": "skipped", "Failure": {"Message": "AppArmor is disabled on this host"}},
{"ContainerHierarchyTexts": ["[k8s.io] Container"], "LeafNodeType": "It", "LeafNodeText": "stop", "State": "timedout"},
{"ContainerHierarchyTexts": ["[k8s.io] Container"], "LeafNodeType": "It", "LeafNodeText": "benchmark about start", "State": "skipped"}
]}]`

func read(t *testing.T, text string) ([]Spec, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "report.json")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return ReadReport(file)
}

func TestReadReport(t *testing.T) {
	specs, err := read(t, report)
	if err != nil {
		t.Fatal(err)
	}
	want := []Spec{
		{"AppArmor", "profile", Skips, "AppArmor is disabled on this host"},
		{"Container", "stop", Fails, ""},
		{"Streaming", "host network", Fails, "not in a VM"},
		{"Streaming", "runtime should support streaming interfaces runtime should support attach [Conformance]", Passes, ""},
	}
	if len(specs) != len(want) {
		t.Fatalf("got %v", specs)
	}
	for i := range want {
		if specs[i] != want[i] {
			t.Errorf("got %v, want %v", specs[i], want[i])
		}
	}
	for _, bad := range []string{"", "{}", `[{"SpecReports": [{"LeafNodeType": "BeforeSuite", "State": "failed"}]}]`} {
		if specs, err := read(t, bad); err == nil {
			t.Errorf("%q: got %v", bad, specs)
		}
	}
}

func TestCompare(t *testing.T) {
	specs, err := read(t, report)
	if err != nil {
		t.Fatal(err)
	}
	known, err := parseKnown(`
# a comment
fails | Streaming > host network | the host's network is not in the VM
skips/fails | AppArmor > profile | no AppArmor here
fails | Container > stop | slow
`)
	if err != nil {
		t.Fatal(err)
	}
	if wrong := known.Compare(specs); len(wrong) > 0 {
		t.Errorf("got %q", wrong)
	}
	attach := "Streaming > runtime should support streaming interfaces runtime should support attach [Conformance]"
	known[attach] = Expectation{[]Outcome{Fails}, "unexpectedly passes"}
	delete(known, "Container > stop")
	delete(known, "AppArmor > profile")
	known["Gone > gone"] = Expectation{[]Outcome{Fails}, "no such spec"}
	if wrong := known.Compare(specs); len(wrong) != 4 {
		t.Errorf("got %q, want 4", wrong)
	}
}

func TestKnownIsStrict(t *testing.T) {
	if _, err := ReadKnown(); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"fails | x", "passes | x | y", "fails | x |  ", "fails | x | y\nskips | x | z"} {
		if known, err := parseKnown(bad); err == nil {
			t.Errorf("%q: got %v", bad, known)
		}
	}
}

func TestConformance(t *testing.T) {
	specs, err := read(t, report)
	if err != nil {
		t.Fatal(err)
	}
	text := Conformance(specs, Known{"Streaming > host network": {[]Outcome{Fails}, "the host's network"}}, "critest v1")
	for _, want := range []string{
		"**4 specs: 1 pass, 2 fail, 1 are skipped by critest.**", "| Streaming | 1 | 1 | 0 |",
		"- **fails**: host network (the host's network)", "- **fails**: stop (not expected", "critest v1",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
}
