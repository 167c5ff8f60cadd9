package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// inNode is the folder in the node that is like the module's here.
const inNode = "/caisson"

// suite runs the end-to-end tests in the node, with Cloud Hypervisor on the node's KVM. What they
// need is built here and copied. Arguments are the test program's.
func (n *node) suite(ctx context.Context, args []string) error {
	vmm, err := exec.LookPath("cloud-hypervisor")
	if err != nil {
		return errors.New("skipped all tests with Cloud Hypervisor: there is no cloud-hypervisor in PATH; put a release of it there")
	}
	if err := n.up(ctx); err != nil {
		return err
	}
	test := n.path("e2e.test")
	build := exec.CommandContext(ctx, "go", "test", "-c", "-tags=containers_image_openpgp", "-o", test, "./e2e")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the tests: %w\n%s", err, out)
	}
	if err := n.ssh(ctx, "rm -rf "+inNode+"; mkdir -p "+inNode+"/build "+inNode+"/e2e").Run(); err != nil {
		return fmt.Errorf("prepare %s in the node: %w", inNode, err)
	}
	for to, from := range map[string][]string{
		inNode:            {"bin", "go.mod"},
		inNode + "/build": {"build/guest", "build/images", "build/tools"},
		inNode + "/e2e":   {test},
		"/usr/local/bin":  {vmm},
	} {
		if err := n.copy(ctx, append(from, to), "", remote); err != nil {
			return err
		}
	}
	command := []string{"cd", inNode + "/e2e", "&&", "CAISSON_E2E_DRIVER=cloud-hypervisor", "./" + filepath.Base(test)}
	for _, arg := range args {
		command = append(command, "'"+strings.ReplaceAll(arg, "'", `'\''`)+"'")
	}
	return n.run(ctx, command)
}
