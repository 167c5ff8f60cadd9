package guest

import (
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
)

func emptyDir(at, sub string) *agent.Mount {
	return &agent.Mount{Destination: at, Source: &agent.Mount_EmptyDir{EmptyDir: &agent.EmptyDir{Name: "v", SubPath: sub}}}
}

func TestSubPath(t *testing.T) {
	ctx, c := startAgent(t)
	r, _ := create(t, ctx, c, "one", specOf("sh", "-c", "echo x > /sub/file; ln -s / /all/out; ln -s /etc/passwd /all/secret"),
		&agent.CreateRequest{Mounts: []*agent.Mount{emptyDir("/sub", "a/b"), emptyDir("/all", "")}})
	if s := r.start().wait(); s.ExitCode != 0 {
		_, errs := r.logs()
		t.Fatalf("got %v, %s", s, errs)
	}
	r.remove()
	// What the first container left is there for the next, a single file too.
	r, _ = create(t, ctx, c, "two", specOf("cat", "/all/a/b/file", "/file"),
		&agent.CreateRequest{Mounts: []*agent.Mount{emptyDir("/all", ""), emptyDir("/file", "a/b/file")}})
	r.start().wait()
	if out, errs := r.logs(); out != "x\nx\n" || errs != "" {
		t.Errorf("got %q, %q", out, errs)
	}
	r.remove()
	for _, sub := range []string{"../up", "/abs"} {
		_, _, err := tryCreate(t, ctx, c, "bad", specOf("true"), &agent.CreateRequest{Mounts: []*agent.Mount{emptyDir("/x", sub)}})
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("sub path %q: %v", sub, err)
		}
	}
	// Links that lead out of the volume lead nowhere, or to what the volume has of that name.
	for _, sub := range []string{"out/etc/passwd", "secret"} {
		r, _, err := tryCreate(t, ctx, c, "bad", specOf("cat", "/x"), &agent.CreateRequest{Mounts: []*agent.Mount{emptyDir("/x", sub)}})
		if err != nil {
			continue
		}
		r.start().wait()
		if out, _ := r.logs(); strings.Contains(out, "root:") {
			t.Errorf("sub path %q read a file that is the guest's own", sub)
		}
		r.remove()
	}
}
