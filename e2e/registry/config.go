package registry

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Config are the files by which a runtime is sent to a registry on loopback: see
// containers-registries.conf(5) and containers-policy.json(5).
type Config struct {
	RegistriesConf, Policy string
}

// WriteConfig writes configuration to dir that has each of the registries (docker.io, ...) served
// by the one at the address. Nothing else can be reached with it: no public registry is asked.
func WriteConfig(dir string, served map[string]string) (Config, error) {
	var b strings.Builder
	b.WriteString("unqualified-search-registries = [\"docker.io\"]\nshort-name-mode = \"disabled\"\n")
	for public, addr := range served {
		fmt.Fprintf(&b, "\n[[registry]]\nprefix = %q\nlocation = %q\ninsecure = true\n", public, addr+"/"+public)
	}
	c := Config{filepath.Join(dir, "registries.conf"), filepath.Join(dir, "policy.json")}
	if err := os.WriteFile(c.RegistriesConf, []byte(b.String()), 0o644); err != nil {
		return Config{}, fmt.Errorf("write registry configuration: %w", err)
	}
	policy := `{"default": [{"type": "insecureAcceptAnything"}]}` + "\n"
	if err := os.WriteFile(c.Policy, []byte(policy), 0o644); err != nil {
		return Config{}, fmt.Errorf("write registry configuration: %w", err)
	}
	return c, nil
}
