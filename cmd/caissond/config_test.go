package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func load(t *testing.T, text string) (Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return loadConfig(path)
}

func TestEveryKeyIsOptional(t *testing.T) {
	c, err := load(t, "")
	if err != nil {
		t.Fatal(err)
	}
	if c.String() != defaults().String() {
		t.Fatalf("an empty file changes the defaults:\n%s", c)
	}
}

func TestEffectiveConfigReadsBack(t *testing.T) {
	c, err := load(t, "root = '/srv/caisson'\n[vm]\nmemory = '1Gi'\n[log]\nlevel = 'debug'\n")
	if err != nil {
		t.Fatal(err)
	}
	again, err := load(t, c.String())
	if err != nil {
		t.Fatalf("%v in\n%s", err, c)
	}
	if again.String() != c.String() || again.VM.Memory != 1<<30 || again.Root != "/srv/caisson" {
		t.Fatalf("got\n%s\nwant\n%s", again, c)
	}
}

func TestNetNSDir(t *testing.T) {
	for text, want := range map[string]string{
		"state = '/run/c'\n": "/run/c/netns", "[cni]\nnetns_dir = '/var/run/netns'\n": "/var/run/netns",
	} {
		c, err := load(t, text)
		if err != nil {
			t.Fatal(err)
		}
		if got := networkOptions(c).NetNSDir; got != want {
			t.Errorf("%q: namespaces are in %s, want %s", text, got, want)
		}
	}
}

func TestBadConfigSaysWhereAndWhat(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"misspelt key", "\nlisten = '/a'\nrot = '/b'\n", `line 3: unknown key "rot"; did you mean "root"?`},
		{"misspelt key in a table", "[metrics]\nlistn = ''\n", `line 2: unknown key "metrics.listn"; did you mean "metrics.listen"?`},
		{"key outside its table", "memory = '1Gi'\n", `did you mean "vm.memory"?`},
		{"wrong type", "root = 7\n", "line 1, column 8"},
		{"no TOML", "root = \n", "line 1"},
		{"bad size", "[vm]\nmemory = 'lots'\n", "want a quantity such as 512Mi"},
		{"too little memory", "[vm]\nmemory = '1Mi'\n", "at least 128Mi"},
		{"bad duration", "[vm]\nwatchdog = 'soon'\n", "want one such as 90s"},
		{"watchdog too quick", "[vm]\nwatchdog = '1s'\n", "at least 5s"},
		{"unknown place", "[vm]\nempty_dirs = 'disk'\n", "want one of guest, node"},
		{"unknown driver", "driver = 'xen'\n", "want one of auto, cloud-hypervisor, qemu"},
		{"relative path", "root = 'here'\n", "want an absolute path"},
		{"relative folder of namespaces", "[cni]\nnetns_dir = 'netns'\n", "want an absolute path"},
		{"state too long", "state = '/" + strings.Repeat("x", 80) + "'\n", "choose a shorter path"},
		{"bad level", "[log]\nlevel = 'loud'\n", "line 2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := load(t, tt.text)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}

func TestNamedConfigMustExist(t *testing.T) {
	if _, err := loadConfig(filepath.Join(t.TempDir(), "none.toml")); err == nil {
		t.Fatal("a missing --config file was ignored")
	}
}

func TestWarm(t *testing.T) {
	for _, test := range []struct {
		warm             int
		template, driver string
		want             int
	}{
		{-1, "node", "cloud-hypervisor", 1},
		{-1, "node", "qemu", 0},
		{-1, "namespace", "cloud-hypervisor", 0},
		{0, "node", "cloud-hypervisor", 0},
		{3, "node", "qemu", 3},
	} {
		c := defaults()
		c.VM.Warm, c.VM.Template = test.warm, test.template
		if err := c.validate(); err != nil {
			t.Error(err)
		}
		if got := c.warm(test.driver); got != test.want {
			t.Errorf("%+v: %d", test, got)
		}
	}
}
