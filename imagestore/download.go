package imagestore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

const (
	parallelDownloads = 3
	downloadBuffer    = 128 << 10
)

// download fetches the layers of an image, the bottom first, a few at once.
type download struct {
	remote   *remote
	spools   []*spool // one per layer; equal layers share one
	patience *patience
	done     *atomic.Int64 // bytes received
}

func newDownload(m *remote, dir string, p *patience, done *atomic.Int64) (*download, error) {
	d := &download{remote: m, patience: p, done: done}
	known := map[digest.Digest]*spool{}
	for _, l := range m.layers {
		if known[l.digest] == nil {
			s, err := newSpool(dir)
			if err != nil {
				d.close()
				return nil, fmt.Errorf("stage layer: %w", err)
			}
			known[l.digest] = s
		} else {
			known[l.digest].keep = true
		}
		d.spools = append(d.spools, known[l.digest])
	}
	return d, nil
}

func (d *download) close() {
	for _, s := range d.spools {
		s.close()
	}
}

// run fetches all layers into their spools. When it returns, each of them has ended.
func (d *download) run(ctx context.Context) error {
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	first := map[*spool]bool{}
	var work []int
	for i, s := range d.spools {
		if !first[s] {
			first[s] = true
			work = append(work, i)
		}
	}
	for range min(parallelDownloads, len(work)) {
		g.Go(func() error {
			for {
				n := int(next.Add(1)) - 1
				if n >= len(work) {
					return nil
				}
				i := work[n]
				err := d.layer(ctx, d.remote.layers[i], d.spools[i])
				d.spools[i].end(err)
				if err != nil {
					return err
				}
			}
		})
	}
	err := g.Wait()
	for _, s := range d.spools {
		s.end(err)
	}
	return err
}

// layer fetches one layer and checks its size and digest.
func (d *download) layer(ctx context.Context, l layer, to *spool) error {
	timer := d.patience.watch()
	defer timer.Stop()
	stream, err := d.remote.blob(ctx, l)
	if err != nil {
		return fmt.Errorf("layer %s: %w", l.digest, err)
	}
	defer stream.Close()
	verifier := l.digest.Verifier()
	var size int64
	for buf := make([]byte, downloadBuffer); ; {
		timer.Reset(d.patience.limit)
		n, err := stream.Read(buf)
		d.done.Add(int64(n))
		if size += int64(n); size > l.size {
			return fmt.Errorf("layer %s is longer than the %d bytes its manifest says: %w", l.digest, l.size, errdefs.ErrDataLoss)
		}
		timer.Stop() // what the reader of the spool takes its time for is not the registry's fault
		if err := to.write(ctx, buf[:n]); err != nil {
			return fmt.Errorf("stage layer %s: %w", l.digest, err)
		}
		if _, err := verifier.Write(buf[:n]); err != nil {
			return err
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("layer %s broke off after %d of %d bytes: %w", l.digest, size, l.size, d.remote.failed(ctx, err))
		}
	}
	if !verifier.Verified() {
		return fmt.Errorf("layer %s arrived damaged (%d of %d bytes, wrong digest); pull again, or have the registry checked: %w", l.digest, size, l.size, errdefs.ErrDataLoss)
	}
	return nil
}

// errStalled is the cause of a pull that ended for lack of data.
var errStalled = errors.New("the registry sends nothing")

// patience ends a pull that makes no progress.
type patience struct {
	limit  time.Duration
	cancel context.CancelCauseFunc
}

// watch starts a timer that ends the pull; who receives something starts it anew with Reset(limit).
func (p *patience) watch() *time.Timer {
	return time.AfterFunc(p.limit, func() {
		p.cancel(fmt.Errorf("%w for %v; check the network or raise the time-out: %w", errStalled, p.limit, errdefs.ErrUnavailable))
	})
}
