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
	return rehearse(ctx, rpc, false)
}

// rehearse has a guest that is no pod's yet take a container through its life. One that is to stay is left as it
// is in a pod, and so is the guest's memory; nothing else is done with such a guest.
func rehearse(ctx context.Context, rpc agent.AgentClient, stay bool) error {
	spec, err := ociSpec(PodConfig{}, ContainerConfig{Command: []string{"rehearsal"}}, ocispec.ImageConfig{})
	if err != nil {
		return err
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	if _, err := rpc.Rehearse(ctx, &agent.RehearseRequest{Spec: data, Stay: stay}); err != nil {
		return fmt.Errorf("rehearse a container: %w", err)
	}
	return nil
}
