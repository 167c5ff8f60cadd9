package podvm

import (
	"fmt"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
)

func TestImageVolumes(t *testing.T) {
	declared := map[string]struct{}{
		"/data/": {}, "/data": {}, "relative": {}, "/a/../b": {}, "/pvc": {}, "/pvc/below": {}, "/pvcs": {},
		"/dev": {}, "/dev/shm": {}, "/dev/own": {}, "/sys/fs/cgroup": {}, "/etc/hostname": {}, "/proc/x": {},
	}
	got, err := imageVolumes(declared, []Mount{{ContainerPath: "/pvc/"}})
	if want := []string{"/b", "/data", "/dev/own", "/pvcs", "/relative"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	if _, err := imageVolumes(map[string]struct{}{"/x/..": {}}, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("the root: %v", err)
	}
	for i := range maxImageVolumes + 1 {
		declared[fmt.Sprint("/many/", i)] = struct{}{}
	}
	if _, err := imageVolumes(declared, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("too many: %v", err)
	}
}
