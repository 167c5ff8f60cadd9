package main

import (
	"flag"
	"os"
	"testing"
)

var update = flag.Bool("update", false, "write deploy/config.toml")

// The example configuration is the defaults, as the daemon prints them.
func TestExampleConfig(t *testing.T) {
	const path = "../../deploy/config.toml"
	want := "# /etc/caisson/config.toml: every key with its default. All are optional.\n" + defaults().String()
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != want {
		t.Fatalf("deploy/config.toml is not what the code says (%v): run 'go test ./cmd/caissond -update'", err)
	}
}
