// Package critest judges Caisson by critest, the conformance suite of the CRI: it runs all of it,
// unmodified, compares the outcome of each spec with what is known, and writes docs/CONFORMANCE.md.
package critest

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
)

// Outcome of a spec.
type Outcome string

// The outcomes. Whatever else Ginkgo has (panicked, interrupted, timed out) is a failure.
const (
	Passes Outcome = "passes"
	Fails  Outcome = "fails"
	Skips  Outcome = "skips"
)

// Spec is what became of one spec.
type Spec struct {
	// Group is the outermost description, Name the rest of the spec's text.
	Group, Name string
	Outcome     Outcome
	// Message is why it failed or was skipped, as critest says.
	Message string
}

// ginkgoReport is the part of Ginkgo's JSON report that is read here.
// Source: github.com/onsi/ginkgo/v2/types.Report.
type ginkgoReport struct {
	SpecReports []struct {
		ContainerHierarchyTexts []string
		LeafNodeType            string
		LeafNodeText            string
		State                   string
		Failure                 struct{ Message string }
	}
}

// ReadReport parses Ginkgo's JSON report. Benchmarks are no specs and left out; a failed setup of
// the whole suite is an error.
func ReadReport(file string) ([]Spec, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read critest's report: %w", err)
	}
	var reports []ginkgoReport
	if err := json.Unmarshal(data, &reports); err != nil {
		return nil, fmt.Errorf("read critest's report %s: %w", file, err)
	}
	var specs []Spec
	for _, report := range reports {
		for _, r := range report.SpecReports {
			if r.LeafNodeType != "It" {
				if r.State != "passed" && r.State != "skipped" {
					return nil, fmt.Errorf("critest's %s failed: %s", r.LeafNodeType, r.Failure.Message)
				}
				continue
			}
			if len(r.ContainerHierarchyTexts) == 0 {
				return nil, fmt.Errorf("critest's report has a spec outside all groups: %q", r.LeafNodeText)
			}
			s := Spec{
				Group:   clean(r.ContainerHierarchyTexts[0]),
				Name:    clean(strings.Join(append(slices.Clone(r.ContainerHierarchyTexts[1:]), r.LeafNodeText), " ")),
				Outcome: outcome(r.State),
				Message: r.Failure.Message,
			}
			if s.Outcome == Skips && s.Message == "" || strings.Contains(strings.ToLower(s.Group+s.Name), "benchmark") {
				continue // left out by the command line
			}
			specs = append(specs, s)
		}
	}
	slices.SortFunc(specs, func(a, b Spec) int {
		return strings.Compare(a.Group+"\x00"+a.Name, b.Group+"\x00"+b.Name)
	})
	return specs, nil
}

// clean takes the marks out of a spec's text that say nothing about the spec.
func clean(text string) string {
	return strings.Join(strings.Fields(strings.TrimPrefix(text, "[k8s.io]")), " ")
}

func outcome(state string) Outcome {
	switch state {
	case "passed":
		return Passes
	case "skipped", "pending":
		return Skips
	default:
		return Fails
	}
}
