package podvm

import (
	"context"
	"encoding/json"
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// Prepare has a VM that becomes a template do what every pod's start would have to do, but for what
// makes it that pod.
func Prepare(ctx context.Context, v vmm.VM) error {
	client := agent.NewClient(v)
	defer client.Close()
	rpc, err := client.RPC(ctx)
	if err != nil {
		return err
	}
	if _, err := rpc.Prepare(ctx, &agent.PrepareRequest{ScratchAddr: scratchAddress(), CardMac: vmm.CardMAC}); err != nil {
		return fmt.Errorf("prepare the guest: %w", err)
	}
	return rehearse(ctx, rpc)
}

// rehearse has a guest that is no pod's yet take a container through its life.
func rehearse(ctx context.Context, rpc agent.AgentClient) error {
	return rehearseWith(ctx, rpc, "rehearsal", nil)
}

// rehearseWith does so with a command in a container of these files. With files it is left running.
func rehearseWith(ctx context.Context, rpc agent.AgentClient, command string, rootfs *agent.Rootfs) error {
	spec, err := ociSpec(PodConfig{}, ContainerConfig{Command: []string{command}}, ocispec.ImageConfig{})
	if err != nil {
		return err
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	if _, err := rpc.Rehearse(ctx, &agent.RehearseRequest{Spec: data, Rootfs: rootfs}); err != nil {
		return fmt.Errorf("rehearse a container: %w", err)
	}
	return nil
}
