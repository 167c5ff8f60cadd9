package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/pelletier/go-toml/v2"
)

// TestCheck runs caissond check where all is well, and where one thing is missing: its line says what
// mends it.
func TestCheck(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*harness.Config)
		line   string // begins with this
		says   []string
	}{
		"nothing": {func(*harness.Config) {}, "", nil},
		"guest": {
			func(c *harness.Config) { c.Guest = filepath.Join(filepath.Dir(c.Root), "no-guest") },
			"FAIL  guest ", []string{"no-guest", "caissond guest build"},
		},
		"CNI configuration": {
			func(c *harness.Config) { c.CNI.ConfDir = filepath.Join(filepath.Dir(c.Root), "no-cni") },
			"FAIL  CNI ", []string{"no-cni", "install a network plugin"},
		},
		"QEMU": {
			func(c *harness.Config) { c.Driver, c.VM.QEMU = "qemu", "/no/such/qemu" },
			"FAIL  virtual machines ", []string{"/no/such/qemu", "install"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := harness.New(t, c.change)
			data, err := toml.Marshal(d.Config)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(d.Dir, "check.toml")
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command(harness.Bin("caissond"), "check", "--config", file).CombinedOutput()
			if c.line == "" {
				if err != nil || strings.Contains(string(out), "FAIL") {
					t.Errorf("%v\n%s", err, out)
				}
				return
			}
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() <= 0 {
				t.Errorf("it ended with %v", err)
			}
			_, line, is := strings.Cut("\n"+string(out), "\n"+c.line)
			line, _, _ = strings.Cut(line, "\n")
			if !is {
				t.Fatalf("no line %q in\n%s", c.line, out)
			}
			has(t, line, c.says...)
		})
	}
}
