package server

import (
	"context"
	"io"
	"time"

	"github.com/caisson-vm/caisson/imagestore"
	"github.com/caisson-vm/caisson/podvm"
	"github.com/caisson-vm/caisson/podvm/agent"
)

// Pods is what the server needs of the podvm.Manager; see Manage.
type Pods interface {
	Run(ctx context.Context, c podvm.PodConfig) (Pod, error)
	// Pod and Container take a full id or a prefix that is unique.
	Pod(id string) (Pod, error)
	Container(id string) (Container, error)
	Pods() []Pod
	Containers() []Container
	// Events ends with ctx, or when its reader was too slow.
	Events(ctx context.Context) <-chan podvm.Event
}

// Pod is what the server needs of a podvm.Pod.
type Pod interface {
	Status() podvm.PodStatus
	Create(ctx context.Context, c podvm.ContainerConfig) (Container, error)
	Stop(ctx context.Context) error
	Remove(ctx context.Context) error
	Update(ctx context.Context, overhead, resources *podvm.Resources) error
	Stats(ctx context.Context) (podvm.PodStats, error)
	PortForward(ctx context.Context, port uint16, stream io.ReadWriteCloser) error
}

// Container is what the server needs of a podvm.Container.
type Container interface {
	Status() podvm.ContainerStatus
	Start(ctx context.Context) error
	Stop(ctx context.Context, grace time.Duration) error
	Remove(ctx context.Context) error
	Update(ctx context.Context, r podvm.Resources) error
	Exec(ctx context.Context, c podvm.ExecConfig, stdio agent.IO) (int32, error)
	Attach(ctx context.Context, stdio agent.IO) error
	ReopenLog(ctx context.Context) error
}

var _ Images = (*imagestore.Store)(nil)

// Images is what the server needs of the imagestore.Store.
type Images interface {
	Pull(ctx context.Context, ref string, auth *imagestore.Auth) (imagestore.Image, error)
	Image(ref string) (imagestore.Image, error)
	Config(ref string) ([]byte, error)
	Images() []imagestore.Image
	Remove(ctx context.Context, ref string) error
	Usage() (imagestore.Usage, error)
}

// Manage lets the server work on a podvm.Manager.
func Manage(m *podvm.Manager) Pods { return manager{m} }

// manager and pod turn podvm's concrete types into the interfaces above.
type (
	manager struct{ *podvm.Manager }
	pod     struct{ *podvm.Pod }
)

func (m manager) Run(ctx context.Context, c podvm.PodConfig) (Pod, error) {
	p, err := m.Manager.Run(ctx, c)
	if err != nil {
		return nil, err
	}
	return pod{p}, nil
}

func (m manager) Pod(id string) (Pod, error) {
	p, err := m.Manager.Pod(id)
	if err != nil {
		return nil, err
	}
	return pod{p}, nil
}

func (m manager) Pods() []Pod {
	var all []Pod
	for _, p := range m.Manager.Pods() {
		all = append(all, pod{p})
	}
	return all
}

func (m manager) Container(id string) (Container, error) {
	c, err := m.Manager.Container(id)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (m manager) Containers() []Container {
	var all []Container
	for _, c := range m.Manager.Containers() {
		all = append(all, c)
	}
	return all
}

func (p pod) Create(ctx context.Context, config podvm.ContainerConfig) (Container, error) {
	c, err := p.Pod.Create(ctx, config)
	if err != nil {
		return nil, err
	}
	return c, nil
}
