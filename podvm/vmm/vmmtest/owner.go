package vmmtest

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/caisson-vm/caisson/podvm/vmm"
)

// ownerVar holds, in a process that is to launch a VM and be killed, which VM that is.
const ownerVar = "CAISSON_VMMTEST_OWNER"

// owned is what an owner is told.
type owned struct {
	Config vmm.Config
	Image  string
}

// Owner tells whether this process is one that the suite started to launch a VM and be killed: it
// comes straight to Run.
func Owner() bool { return os.Getenv(ownerVar) != "" }

// own launches a VM, speaks with its guest, tells boot id and image's address on descriptor 3, and waits for its end.
func own(t *testing.T, d vmm.Driver) {
	var o owned
	if err := json.Unmarshal([]byte(os.Getenv(ownerVar)), &o); err != nil {
		t.Fatal(err)
	}
	if o.Config.Template != "" {
		o.Config.Tap = newWire(t).tap
	}
	ctx := t.Context()
	v, err := d.Launch(ctx, o.Config)
	if err != nil {
		t.Fatal(err)
	}
	address, err := addImage(ctx, v, o.Image)
	if err != nil {
		t.Fatal(err)
	}
	id, err := newGuest(v).setup(ctx, o.Config.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintln(os.NewFile(3, "owner"), id, address); err != nil {
		t.Fatal(err)
	}
	<-ctx.Done()
}

// orphan has another process launch a VM, kills that process, and returns the guest's boot id
// and the address of its image.
func orphan(t *testing.T, c vmm.Config, image string) (bootID, address string) {
	t.Helper()
	name, _, _ := strings.Cut(t.Name(), "/")
	told, tell, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer told.Close()
	text, err := json.Marshal(owned{c, image})
	if err != nil {
		t.Fatal(err)
	}
	owner := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+regexp.QuoteMeta(name)+"$", "-test.timeout="+bootLimit.String())
	owner.Env = append(os.Environ(), ownerVar+"="+string(text))
	var output strings.Builder
	owner.Stdout, owner.Stderr, owner.ExtraFiles = &output, &output, []*os.File{tell}
	owner.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = owner.Start()
	tell.Close()
	if err != nil {
		t.Fatal(err)
	}
	_, err = fmt.Fscanln(bufio.NewReader(told), &bootID, &address)
	owner.Process.Kill()
	owner.Wait()
	if err != nil {
		t.Fatalf("the owner did not launch the VM: %v: %s", err, output.String())
	}
	return bootID, address
}

// sweep kills what a VM's owner may have left.
func sweep(t *testing.T, d vmm.Driver, c vmm.Config) {
	t.Helper()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), callLimit)
		defer cancel()
		if v, err := d.Attach(ctx, c); err == nil {
			if err := v.Kill(ctx); err != nil {
				t.Error(err)
			}
		}
	})
}
