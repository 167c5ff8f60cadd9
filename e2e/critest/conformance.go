package critest

import (
	"fmt"
	"strings"
)

// Conformance is docs/CONFORMANCE.md. It depends on the outcomes alone, so that it changes only
// when they do.
func Conformance(specs []Spec, known Known, versions string) string {
	var b strings.Builder
	total := count(specs)
	fmt.Fprintf(&b, `# Conformance with the CRI

This file is written by `+"`go test ./e2e/critest`"+`, which runs all of critest, unmodified: %s.
What is known not to pass stands in e2e/critest/known.txt with its reason; the test fails when
anything else does not pass, and when something in that list does.

**%d specs: %d pass, %d fail, %d are skipped by critest.**

| group | pass | fail | skipped |
| --- | --- | --- | --- |
`, versions, len(specs), total[Passes], total[Fails], total[Skips])
	groups := byGroup(specs)
	for _, g := range groups {
		n := count(g)
		fmt.Fprintf(&b, "| %s | %d | %d | %d |\n", g[0].Group, n[Passes], n[Fails], n[Skips])
	}
	for _, g := range groups {
		fmt.Fprintf(&b, "\n## %s\n\n", g[0].Group)
		for _, s := range g {
			if s.Outcome == Passes {
				fmt.Fprintf(&b, "- passes: %s\n", s.Name)
				continue
			}
			reason := known[key(s.Group, s.Name)].Reason
			if reason == "" {
				reason = "not expected; see the test's output"
			}
			fmt.Fprintf(&b, "- **%s**: %s (%s)\n", s.Outcome, s.Name, reason)
		}
	}
	return b.String()
}

func count(specs []Spec) map[Outcome]int {
	n := map[Outcome]int{}
	for _, s := range specs {
		n[s.Outcome]++
	}
	return n
}

// byGroup splits sorted specs where the group changes.
func byGroup(specs []Spec) [][]Spec {
	var groups [][]Spec
	for i, s := range specs {
		if i == 0 || specs[i-1].Group != s.Group {
			groups = append(groups, nil)
		}
		groups[len(groups)-1] = append(groups[len(groups)-1], s)
	}
	return groups
}
