package registry

import (
	"net/http"
	"sync"

	"github.com/caisson-vm/caisson/e2e/images"
	"github.com/google/go-containerregistry/pkg/name"
)

// Kind is a way for a transfer to fail.
type Kind int

// The kinds of faults.
const (
	// Cut ends the connection.
	Cut Kind = iota
	// Stall sends nothing more, and keeps the connection open.
	Stall
	// Corrupt changes a byte and goes on.
	Corrupt
)

// Fault is something that goes wrong with every large blob of a repository after some bytes.
type Fault struct {
	Kind Kind
	// After is how many bytes of a blob are sent rightly. Smaller blobs arrive whole.
	After int

	once sync.Once
	hit  chan struct{}
}

// Hit is closed when the fault has happened for the first time.
func (f *Fault) Hit() <-chan struct{} { return f.hit }

// Break makes the blobs of an image's repository fail until Mend.
func (r *Registry) Break(ref string, kind Kind, after int) *Fault {
	f := &Fault{Kind: kind, After: after, hit: make(chan struct{})}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults[repository(ref)] = f
	return f
}

// Mend ends what Break began. Transfers under way keep their fault.
func (r *Registry) Mend(ref string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.faults, repository(ref))
}

func repository(ref string) string {
	parsed, err := name.ParseReference(ref)
	if err != nil {
		panic(err) // references are the test's own
	}
	return images.Repository(parsed)
}

func (f *Fault) wrap(w http.ResponseWriter, req *http.Request) http.ResponseWriter {
	return &faulty{ResponseWriter: w, fault: f, req: req}
}

// faulty is a response in which the fault happens. It hides the writer's ReadFrom.
type faulty struct {
	http.ResponseWriter
	fault *Fault
	req   *http.Request
	sent  int
}

func (w *faulty) Write(p []byte) (int, error) {
	left := w.fault.After - w.sent
	if left >= len(p) || left < 0 {
		n, err := w.ResponseWriter.Write(p)
		w.sent += n
		return n, err
	}
	if w.fault.Kind == Corrupt {
		p = append([]byte(nil), p...)
		p[left] ^= 0xff
		w.fault.once.Do(func() { close(w.fault.hit) })
		w.sent = w.fault.After + 1
		return w.ResponseWriter.Write(p)
	}
	n, err := w.ResponseWriter.Write(p[:left])
	w.sent += n
	if err != nil {
		return n, err
	}
	if err := http.NewResponseController(w.ResponseWriter).Flush(); err != nil {
		return n, err
	}
	w.fault.once.Do(func() { close(w.fault.hit) })
	if w.fault.Kind == Stall {
		<-w.req.Context().Done()
	}
	panic(http.ErrAbortHandler)
}
