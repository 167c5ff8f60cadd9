package cloudhv

import (
	"os"
	"path/filepath"
	"testing"
)

// TestStopClock: a clone's clock goes on from where its template's stood. The state is of Cloud Hypervisor
// 54, as far as it is here.
func TestStopClock(t *testing.T) {
	const begin, end = `{"snapshots":{},"snapshot_data":{"state":"{\"clock\":{\"Kvm\":[198,9,196,193,4,0,0,0,`, `,0,0,0,80,119,197,57,232,211,235,24,0,0,0,0]},\"common_cpuid\":[]}"}}`
	for _, c := range []struct{ state, want string }{
		{begin + "4,0,0,0" + end, begin + "0,0,0,0" + end},
		{begin + "14,0,0,0" + end, begin + "10,0,0,0" + end},
		{begin + "2,0,0,0" + end, begin + "2,0,0,0" + end},
		{`{"snapshots":{}}`, `{"snapshots":{}}`},
	} {
		path := filepath.Join(t.TempDir(), "state.json")
		if err := os.WriteFile(path, []byte(c.state), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := stopClock(path); err != nil {
			t.Error(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != c.want {
			t.Errorf("%s became %s, want %s; %v", c.state, got, c.want, err)
		}
	}
}
