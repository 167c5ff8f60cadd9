package measure

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// subject is one runtime under measurement.
type subject struct {
	Endpoint
	Options
	version string
	conn    *grpc.ClientConn
	runtime cri.RuntimeServiceClient
	imageID string
	samples samples
	// losses say of pods that were lost why they were.
	losses []string
}

// samples are the figures by name: seconds of a call, bytes of memory, numbers of processes.
type samples map[string][]float64

func connect(ctx context.Context, e Endpoint, o Options) (*subject, error) {
	conn, err := grpc.NewClient(e.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", e.Name, err)
	}
	s := &subject{Endpoint: e, Options: o, conn: conn, runtime: cri.NewRuntimeServiceClient(conn), samples: samples{}}
	if err := s.prepare(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s at %s: %w", e.Name, e.Address, err)
	}
	return s, nil
}

func (s *subject) close() { s.conn.Close() }

func (s *subject) prepare(ctx context.Context) error {
	v, err := s.runtime.Version(ctx, &cri.VersionRequest{})
	if err != nil {
		return err
	}
	s.version = v.RuntimeName + " " + v.RuntimeVersion
	images := cri.NewImageServiceClient(s.conn)
	p, err := images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: s.Image}})
	if err != nil {
		return err
	}
	s.imageID = p.ImageRef
	return nil
}

func (s *subject) podConfig() *cri.PodSandboxConfig {
	id := rand.Text()
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: "bench-" + id[:8], Namespace: "bench", Uid: id},
		LogDirectory: os.TempDir(),
		Linux: &cri.LinuxPodSandboxConfig{CgroupParent: s.CgroupParent, SecurityContext: &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
		}},
	}
}

// timed runs one call and keeps what it took.
func (s *subject) timed(ctx context.Context, count bool, name string, call func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, opLimit)
	defer cancel()
	start := time.Now()
	if err := call(ctx); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if count {
		s.add(name, time.Since(start).Seconds())
	}
	return nil
}

// cycle takes one pod through its life.
func (s *subject) cycle(ctx context.Context, count bool) (err error) {
	p := &pod{subject: s, config: s.podConfig()}
	defer func() {
		if err != nil && p.id != "" {
			p.remove(context.WithoutCancel(ctx), false)
		}
	}()
	for _, step := range []func(context.Context, bool) error{p.settle, p.boot, p.run, p.phases, p.create, p.containerPhases, p.start, p.exec, p.weigh, p.remove, p.settle} {
		if err := step(ctx, count); err != nil {
			return err
		}
	}
	if count {
		s.add("Create+Start", s.last("CreateContainer")+s.last("StartContainer"))
		s.add("pod running", s.last("RunPodSandbox")+s.last("Create+Start"))
	}
	return nil
}

func (s *subject) add(name string, v float64) { s.samples[name] = append(s.samples[name], v) }

func (s *subject) last(name string) float64 { return s.samples[name][len(s.samples[name])-1] }

// density starts n idle pods beside one another and weighs them together, first without and then with a
// container that sleeps.
func (s *subject) density(ctx context.Context, n int) (err error) {
	var pods []*pod
	defer func() {
		for _, p := range pods {
			err = errors.Join(err, p.remove(context.WithoutCancel(ctx), false))
		}
	}()
	before, unborn := available(), 0
	for i := range n {
		p := &pod{subject: s, config: s.podConfig()}
		start := time.Now()
		if err := p.run(ctx, false); err != nil {
			s.losses = append(s.losses, fmt.Sprintf("idle pod %d: %v", i+1, err))
			if unborn++; unborn > n/10 {
				return fmt.Errorf("idle pod %d: %w", i+1, err)
			}
			continue
		}
		pods = append(pods, p)
		s.add("idle: start", time.Since(start).Seconds())
		if err := p.idlePhases(ctx, i, n); err != nil {
			return err
		}
	}
	left, pss, largest, err := weighAll(pods)
	if err != nil {
		return err
	}
	s.samples["idle: pss per pod"] = []float64{pss}
	s.samples["idle: largest pss"] = []float64{largest}
	s.samples["idle: memory taken per pod"] = []float64{(before - available()) / float64(n)}
	for i, p := range left {
		err := p.create(ctx, false)
		if err == nil {
			err = p.start(ctx, false)
		}
		if err != nil && !p.lost(ctx) {
			return fmt.Errorf("container of idle pod %d: %w", i+1, err)
		}
	}
	if left, pss, _, err = weighAll(left); err != nil {
		return err
	}
	s.samples["idle: pods lost"] = []float64{float64(n - len(left))}
	for _, p := range pods {
		if !slices.Contains(left, p) {
			s.losses = append(s.losses, fmt.Sprintf("idle pod %s: %s", p.id, p.end(ctx)))
		}
	}
	s.samples["idle: pss with a container"] = []float64{pss}
	return nil
}

// lostLimit is how long a runtime may take to see that a pod is lost.
const lostLimit = 5 * time.Second

// lost tells whether the pod is to blame for what failed in it, because it is not there any more.
func (p *pod) lost(ctx context.Context) bool {
	for end := time.Now().Add(lostLimit); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		status, err := p.runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
		if err == nil && status.GetStatus().GetState() != cri.PodSandboxState_SANDBOX_READY {
			return true
		}
	}
	return false
}

// end is why a pod that is lost has ended, as far as its runtime tells.
func (p *pod) end(ctx context.Context) string {
	status, err := p.runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		return err.Error()
	}
	var info struct{ Reason, Message string }
	if err := json.Unmarshal([]byte(status.Info["info"]), &info); err != nil {
		return err.Error()
	}
	return info.Reason + ": " + info.Message
}

// weighAll returns the pods that are there, the mean of their PSS, and the largest.
func weighAll(pods []*pod) (left []*pod, pss, largest float64, err error) {
	for _, p := range pods {
		w, err := Weigh(p.id)
		if errors.Is(err, errNone) {
			continue
		}
		if err != nil {
			return nil, 0, 0, err
		}
		left = append(left, p)
		pss += w.PSS
		largest = max(largest, w.PSS)
	}
	return left, pss / float64(max(len(left), 1)), largest, nil
}

// pod is one pod with one container.
type pod struct {
	*subject
	config        *cri.PodSandboxConfig
	id, container string
}

// settle keeps what a runtime does ahead of a pod out of the time of another's.
func (s *subject) settle(ctx context.Context, _ bool) error {
	if s.Settle == nil {
		return nil
	}
	return s.Settle(ctx)
}

func (p *pod) boot(ctx context.Context, count bool) error {
	if p.Boot == nil {
		return nil
	}
	return p.timed(ctx, count, "boot alone", p.Boot)
}

func (p *pod) run(ctx context.Context, count bool) error {
	return p.timed(ctx, count, "RunPodSandbox", func(ctx context.Context) error {
		r, err := p.runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: p.config, RuntimeHandler: p.Handler})
		if err != nil {
			return err
		}
		p.id = r.PodSandboxId
		return nil
	})
}

func (p *pod) create(ctx context.Context, count bool) error {
	return p.timed(ctx, count, "CreateContainer", func(ctx context.Context) error {
		r, err := p.runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
			PodSandboxId:  p.id,
			SandboxConfig: p.config,
			Config: &cri.ContainerConfig{
				Metadata: &cri.ContainerMetadata{Name: "bench"},
				Image:    &cri.ImageSpec{Image: p.imageID},
				Command:  []string{"sleep", "3600"},
				LogPath:  p.config.Metadata.Name + ".log",
				// As the kubelet says; where nothing is said containers share the pod's processes.
				Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
					NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
				}},
			},
		})
		if err != nil {
			return err
		}
		p.container = r.ContainerId
		return nil
	})
}

func (p *pod) start(ctx context.Context, count bool) error {
	return p.timed(ctx, count, "StartContainer", func(ctx context.Context) error {
		_, err := p.runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: p.container})
		return err
	})
}

func (p *pod) exec(ctx context.Context, count bool) error {
	return p.timed(ctx, count, "ExecSync", func(ctx context.Context) error {
		r, err := p.runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: p.container, Cmd: []string{"true"}, Timeout: 60})
		if err == nil && r.ExitCode != 0 {
			err = fmt.Errorf("exit code %d: %s", r.ExitCode, r.Stderr)
		}
		return err
	})
}

func (p *pod) weigh(_ context.Context, count bool) error {
	w, err := Weigh(p.id)
	if err == nil && count {
		p.add("pss", w.PSS)
		p.add("processes", w.Processes)
	}
	return err
}

func (p *pod) remove(ctx context.Context, count bool) error {
	defer os.Remove(os.TempDir() + "/" + p.config.Metadata.Name + ".log")
	return p.timed(ctx, count, "Stop+Remove", func(ctx context.Context) error {
		if p.container != "" {
			// The kubelet asks for the grace period; without one the figures compare the runtimes'
			// own work, not a container's patience.
			if _, err := p.runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: p.container}); err != nil {
				return err
			}
		}
		if _, err := p.runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
			return err
		}
		_, err := p.runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.id})
		return err
	})
}
