package critest

import (
	_ "embed"
	"fmt"
	"slices"
	"strings"
)

//go:embed known.txt
var knownText string

// Expectation is a spec that is known not to pass, and why.
type Expectation struct {
	Outcome Outcome
	Reason  string
}

// Known are the specs that are known not to pass, by group and name.
type Known map[string]Expectation

func key(group, name string) string { return group + " > " + name }

// ReadKnown parses the list of known.txt: lines of outcome, group > name, and reason, separated by
// " | ". All others are expected to pass.
func ReadKnown() (Known, error) { return parseKnown(knownText) }

func parseKnown(text string) (Known, error) {
	known := Known{}
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		part := strings.SplitN(line, " | ", 3)
		if len(part) != 3 || strings.TrimSpace(part[2]) == "" {
			return nil, fmt.Errorf("known.txt, line %d: want 'fails | group > name | reason' or 'skips | ...'", n)
		}
		outcome := Outcome(part[0])
		if outcome != Fails && outcome != Skips {
			return nil, fmt.Errorf("known.txt, line %d: outcome %q: want fails or skips", n, part[0])
		}
		if _, ok := known[part[1]]; ok {
			return nil, fmt.Errorf("known.txt, line %d: %q stands there twice", n, part[1])
		}
		known[part[1]] = Expectation{outcome, part[2]}
	}
	return known, nil
}

// Compare lists what is not as expected: a spec that fails or is skipped and should pass, one that
// passes and was thought not to, and entries of the list that no spec has.
func (k Known) Compare(specs []Spec) []string {
	var wrong []string
	seen := map[string]bool{}
	for _, s := range specs {
		name := key(s.Group, s.Name)
		seen[name] = true
		want := Expectation{Outcome: Passes}
		if e, ok := k[name]; ok {
			want = e
		}
		if s.Outcome != want.Outcome {
			wrong = append(wrong, fmt.Sprintf("%s: %s, expected that it %s. %s", name, s.Outcome, want.Outcome, s.Message))
		}
	}
	for name := range k {
		if !seen[name] {
			wrong = append(wrong, fmt.Sprintf("%s: is in known.txt but did not run", name))
		}
	}
	slices.Sort(wrong)
	return wrong
}
