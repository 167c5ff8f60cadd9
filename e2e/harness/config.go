package harness

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

// driverVar names the driver that is to be tested, and templateVar a vm.template other than the usual one.
const (
	driverVar   = "CAISSON_E2E_DRIVER"
	templateVar = "CAISSON_E2E_TEMPLATE"
)

// Config is what a daemon under test is configured with. Its keys are the daemon's; what a test
// leaves alone gets a value inside the scratch folder.
type Config struct {
	Listen string `toml:"listen"`
	Root   string `toml:"root"`
	State  string `toml:"state"`
	Driver string `toml:"driver"`
	Guest  string `toml:"guest"`
	VM     struct {
		Memory   string `toml:"memory,omitempty"`
		QEMU     string `toml:"qemu,omitempty"`
		Template string `toml:"template,omitempty"`
		Warm     int    `toml:"warm"`
		DAX      bool   `toml:"dax"`
		Watchdog string `toml:"watchdog,omitempty"`
		// EmptyDirs is where they are: guest, node.
		EmptyDirs string `toml:"empty_dirs,omitempty"`
	} `toml:"vm"`
	CNI struct {
		ConfDir string   `toml:"conf_dir"`
		BinDirs []string `toml:"bin_dirs"`
	} `toml:"cni"`
	Images struct {
		RegistriesConf string   `toml:"registries_conf"`
		Policy         string   `toml:"policy"`
		Pinned         []string `toml:"pinned,omitempty"`
	} `toml:"images"`
	Metrics struct {
		Listen string `toml:"listen"`
	} `toml:"metrics"`
	Log struct {
		Level string `toml:"level"`
	} `toml:"log"`
}

// newConfig fills a configuration for a daemon that lives in dir, and makes its CNI configuration.
func newConfig(t testing.TB, dir string) Config {
	t.Helper()
	var c Config
	c.Listen = filepath.Join(dir, "cri.sock")
	c.Root = filepath.Join(dir, "root")
	c.State = filepath.Join(dir, "run")
	c.Driver = Driver()
	c.Guest = Guest()
	c.VM.DAX = true
	c.VM.Template = os.Getenv(templateVar)
	c.CNI.ConfDir = filepath.Join(dir, "cni")
	c.CNI.BinDirs = []string{"/opt/cni/bin", "/usr/lib/cni"}
	c.Log.Level = "debug"
	WriteCNI(t, c.CNI.ConfDir, filepath.Join(dir, "ipam"))
	return c
}

// Driver is the driver under test: QEMU, which works on every machine, unless the environment names
// another.
func Driver() string {
	if driver := os.Getenv(driverVar); driver != "" {
		return driver
	}
	return "qemu"
}

// subnet numbers the bridges of one suite; each has a subnet of its own.
var subnet int

// WriteCNI writes a conflist to dir: a bridge with IPv4 and IPv6, and host ports. Addresses are
// kept in ipam.
func WriteCNI(t testing.TB, dir, ipam string) {
	t.Helper()
	subnet++
	text := fmt.Sprintf(`{
  "cniVersion": "1.0.0",
  "name": "caisson-e2e-%[1]d",
  "plugins": [
    {
      "type": "bridge", "bridge": "caisson-e2e%[1]d", "isGateway": true, "hairpinMode": true,
      "ipam": {
        "type": "host-local", "dataDir": %[2]q,
        "ranges": [[{"subnet": "10.213.%[1]d.0/24"}], [{"subnet": "fd00:caa5:%[1]d::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}
  ]
}
`, subnet, ipam)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "10-caisson.conflist"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// write stores the configuration and returns the file's name.
func (c Config) write(t testing.TB, dir string) string {
	t.Helper()
	data, err := toml.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
