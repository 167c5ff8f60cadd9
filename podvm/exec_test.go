package podvm

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// TestExecTerm: a command with a terminal knows what it is, also in a container without one.
func TestExecTerm(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	plain, own := containerConfig("plain"), containerConfig("own")
	own.Env = []EnvVar{{Name: "TERM", Value: []byte("vt100")}}
	c, d := n.running(p, plain), n.running(p, own)
	for _, e := range []struct {
		in   *Container
		tty  bool
		want []string
	}{{c, true, []string{"TERM=xterm"}}, {c, false, nil}, {d, true, []string{"TERM=vt100"}}, {d, false, []string{"TERM=vt100"}}} {
		var out bytes.Buffer // the fake agent says what it was given
		if _, err := e.in.Exec(soon(t), ExecConfig{Command: []string{"top"}, TTY: e.tty}, agent.IO{Stdout: &out}); err != nil {
			t.Fatal(err)
		}
		var process specs.Process
		if err := json.Unmarshal(out.Bytes(), &process); err != nil {
			t.Fatal(err)
		}
		terms := slices.DeleteFunc(process.Env, func(v string) bool { return !strings.HasPrefix(v, "TERM=") })
		if !slices.Equal(terms, e.want) || process.Terminal != e.tty {
			t.Errorf("%s, terminal %v: %q, want %q", e.in.Status().Config.Name, e.tty, terms, e.want)
		}
	}
}
