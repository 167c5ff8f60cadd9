package critest

import (
	_ "embed"
	"fmt"
	"slices"
	"strings"
)

//go:embed known.txt
var knownText string

// Expectation is a spec that is known not to pass, and why. With two outcomes it depends on the
// machine which it is.
type Expectation struct {
	Outcomes []Outcome
	Reason   string
}

// Known are the specs that are known not to pass, by group and name.
type Known map[string]Expectation

func key(group, name string) string { return group + " > " + name }

// ReadKnown parses the list of known.txt: lines of outcomes (with a slash between them), group >
// name, and reason, separated by " | ". All others are expected to pass.
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
		var outcomes []Outcome
		for o := range strings.SplitSeq(part[0], "/") {
			if o != string(Fails) && o != string(Skips) {
				return nil, fmt.Errorf("known.txt, line %d: outcome %q: want fails or skips", n, o)
			}
			outcomes = append(outcomes, Outcome(o))
		}
		if _, ok := known[part[1]]; ok {
			return nil, fmt.Errorf("known.txt, line %d: %q stands there twice", n, part[1])
		}
		known[part[1]] = Expectation{outcomes, part[2]}
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
		want := []Outcome{Passes}
		if e, ok := k[name]; ok {
			want = e.Outcomes
		}
		if !slices.Contains(want, s.Outcome) {
			wrong = append(wrong, fmt.Sprintf("%s: %s, expected that it %s. %s", name, s.Outcome, want[0], s.Message))
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
