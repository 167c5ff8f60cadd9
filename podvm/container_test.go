package podvm

import (
	"reflect"
	"testing"

	"github.com/containerd/errdefs"
)

func TestMergeResources(t *testing.T) {
	old := Resources{CPUQuota: 1, CPUShares: 2, Memory: 3, Unified: map[string]string{"memory.low": "1", "memory.high": "2"}, HugepageLimits: map[string]uint64{"2MB": 1}}
	got := old.merge(Resources{CPUQuota: 10, Memory: -1, CPUSetCPUs: "1", Unified: map[string]string{"memory.high": "3"}, HugepageLimits: map[string]uint64{"1GB": 2}})
	if got.CPUQuota != 10 || got.CPUShares != 2 || got.Memory != -1 || got.CPUSetCPUs != "1" {
		t.Errorf("got %+v", got)
	}
	if got.Unified["memory.low"] != "1" || got.Unified["memory.high"] != "3" || got.HugepageLimits["2MB"] != 1 || got.HugepageLimits["1GB"] != 2 {
		t.Errorf("got %v, %v", got.Unified, got.HugepageLimits)
	}
	if old.Unified["memory.high"] != "2" || len(old.HugepageLimits) != 1 {
		t.Error("merging changed the old limits")
	}
}

// TestMergeMemory: an update of memory alone leaves no swap, as in containerd, whatever there was.
func TestMergeMemory(t *testing.T) {
	old := Resources{Memory: 64, MemorySwap: 64, OOMScoreAdj: 5}
	for name, c := range map[string]struct {
		change, want Resources
		swap         int64 // of the guest's cgroup, with memory
	}{
		"up":             {Resources{Memory: 128}, Resources{Memory: 128, OOMScoreAdj: 5}, 128},
		"down":           {Resources{Memory: 32}, Resources{Memory: 32, OOMScoreAdj: 5}, 32},
		"lifted":         {Resources{Memory: -1}, Resources{Memory: -1, OOMScoreAdj: 5}, -1},
		"both":           {Resources{Memory: 128, MemorySwap: 256}, Resources{Memory: 128, MemorySwap: 256, OOMScoreAdj: 5}, 256},
		"swap":           {Resources{MemorySwap: 100}, Resources{Memory: 64, MemorySwap: 100, OOMScoreAdj: 5}, 100},
		"neither":        {Resources{CPUShares: 2}, Resources{Memory: 64, MemorySwap: 64, CPUShares: 2, OOMScoreAdj: 5}, 64},
		"OOM score kept": {Resources{OOMScoreAdj: 900}, old, 64},
	} {
		got := old.merge(c.change)
		l, err := resources(got)
		if !reflect.DeepEqual(got, c.want) || err != nil || *l.Memory.Swap != c.swap {
			t.Errorf("%s: got %+v, %+v, %v", name, got, l, err)
		}
	}
	if _, err := resources(old.merge(Resources{MemorySwap: 32})); !errdefs.IsInvalidArgument(err) {
		t.Errorf("less swap than memory: %v", err)
	}
}

func TestSignalNumber(t *testing.T) {
	for name, want := range map[string]int{
		"": 15, "SIGTERM": 15, "TERM": 15, "term": 15, "15": 15, "9": 9, "64": 64, "SIGKILL": 9, "SIGUSR1": 10, "SIGWINCH": 28,
		"SIGRTMIN": 34, "RTMIN": 34, "SIGRTMIN+3": 37, "rtmin+15": 49, "SIGRTMAX": 64, "SIGRTMAX-2": 62, "RTMAX-14": 50,
		"SIGCLD": 17, "SIGPOLL": 29, "SIGIOT": 6, "SIGCHLD": 17,
	} {
		if got, err := signalNumber(name); err != nil || int(got) != want {
			t.Errorf("%q: got %d, %v", name, got, err)
		}
	}
	for _, name := range []string{"0", "65", "-1", "SIGNOPE", "SIG", "SIGRTMIN+31", "SIGRTMIN-1", "SIGRTMAX+1", "SIGRTMAX-31", "SIGRTMIN+x", "15 "} {
		if got, err := signalNumber(name); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %d, %v", name, got, err)
		}
	}
}
