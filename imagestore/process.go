package imagestore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containers/image/v5/docker/reference"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/internal/rights"
)

const (
	// The descriptors of the process of a pull: the image's file, and the pipe for reports. Standard output is
	// not that pipe, because libraries write there.
	imageFD, reportFD = 3, 4
	// reportEvery is how often it tells of its progress.
	reportEvery = time.Second
	// processName is what ps and the kernel's messages call it.
	processName = "caissond-pull"
)

// ServePull is the process of a pull, which a Store starts: all that registries and images say is read in it, and
// when that takes too much memory it ends, and nothing else does.
func ServePull() error {
	in := json.NewDecoder(os.Stdin)
	out := &reports{w: os.NewFile(reportFD, "reports")}
	var r request
	if err := in.Decode(&r); err != nil {
		return fmt.Errorf("request: %w", err)
	}
	slog.SetDefault(slog.New(remoteLog{out: out}))
	bridgeLogs()
	b := build{file: os.NewFile(imageFD, "image"), out: out}
	stop := b.reportProgress()
	err := confine(r.Memory)
	if err == nil {
		err = b.pull(in, r)
	}
	stop()
	last := b.progress()
	if last.Done = err == nil; err != nil {
		last.Failed = newFailure(err)
	}
	return out.send(last, nil)
}

// confine bounds the memory of the process, and gives up what it need not be able to do: files that only their
// owners may read are those of the node's configuration.
func confine(memory int64) error {
	if err := os.WriteFile("/proc/self/comm", []byte(processName), 0); err != nil {
		return err
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(1000)), 0); err != nil {
		return err
	}
	limit := &unix.Rlimit{Cur: uint64(memory), Max: uint64(memory)}
	if err := unix.Setrlimit(unix.RLIMIT_DATA, limit); err != nil { // of address space Go takes more than it uses
		return fmt.Errorf("bound its memory: %w", err)
	}
	debug.SetMemoryLimit(memory / 4 * 3)
	debug.SetGCPercent(50) // it keeps little, and a collection costs it little
	permitted, err := rights.Permitted()
	if err != nil {
		return err
	}
	return rights.Keep(permitted & (1 << unix.CAP_DAC_READ_SEARCH))
}

// build makes the EROFS file of one image.
type build struct {
	file                 *os.File
	out                  *reports
	remote               *remote
	downloaded, unpacked atomic.Int64
}

func (b *build) pull(in *json.Decoder, r request) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	ref, err := reference.ParseNormalizedNamed(r.Name)
	if err != nil {
		return fmt.Errorf("image name %.300q: %w: %w", r.Name, err, errdefs.ErrInvalidArgument)
	}
	registries := newRegistries(Options{RegistriesConf: r.RegistriesConf, Policy: r.Policy, AuthFile: r.AuthFile}, r.Dir)
	if b.remote, err = registries.open(ctx, name{ref}, r.Auth); err != nil {
		return err
	}
	defer b.remote.close()
	if err := b.out.send(report{Found: &found{Digest: b.remote.digest, Config: b.remote.config, Total: b.remote.total()}}, nil); err != nil {
		return err
	}
	if err := in.Decode(&goOn{}); err != nil {
		return err // the daemon has no use for it, and ends this process
	}
	raw, config, err := b.remote.readConfig(ctx)
	if err != nil {
		return err
	}
	if err := b.out.send(report{Config: len(raw)}, raw); err != nil {
		return err
	}
	return b.run(ctx, &patience{r.Limit, cancel}, r.Dir, config)
}

// run downloads the layers and merges them meanwhile.
func (b *build) run(ctx context.Context, p *patience, dir string, c *config) error {
	d, err := newDownload(b.remote, dir, p, &b.downloaded)
	if err != nil {
		return err
	}
	defer d.close()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.run(ctx) })
	g.Go(func() error {
		_, err := convert(ctx, b.file, b.remote.config, d.spools, c.RootFS.DiffIDs, &b.unpacked)
		return err
	})
	return g.Wait()
}

func (b *build) progress() report {
	return report{Downloaded: b.downloaded.Load(), Unpacked: b.unpacked.Load()}
}

// reportProgress tells from time to time how far the pull is, until the returned function is called.
func (b *build) reportProgress() (stop func()) {
	ticker := time.NewTicker(reportEvery)
	quit, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-quit:
				return
			case <-ticker.C:
			}
			if b.out.send(b.progress(), nil) != nil {
				return // the daemon has gone
			}
		}
	}()
	return func() {
		ticker.Stop()
		close(quit)
		<-ended
	}
}

// reports carries what the process says to the daemon.
type reports struct {
	mu sync.Mutex
	w  io.Writer // guarded by mu
}

// send sends a report, and what follows it.
func (o *reports) send(r report, raw []byte) error {
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if len(line) >= maxLine {
		return errors.New("a report is too long")
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	_, err = o.w.Write(append(append(line, '\n'), raw...))
	return err
}

// remoteLog is a log whose lines the daemon has.
type remoteLog struct {
	out   *reports
	attrs []slog.Attr
}

func (l remoteLog) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelInfo }

func (l remoteLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	return remoteLog{l.out, append(l.attrs[:len(l.attrs):len(l.attrs)], attrs...)}
}

func (l remoteLog) WithGroup(string) slog.Handler { return l }

func (l remoteLog) Handle(_ context.Context, r slog.Record) error {
	line := &logLine{Level: r.Level, Text: short(r.Message)}
	add := func(a slog.Attr) bool {
		line.Attrs = append(line.Attrs, a.Key, short(a.Value.String()))
		return true
	}
	for _, a := range l.attrs {
		add(a)
	}
	r.Attrs(add)
	return l.out.send(report{Log: line}, nil)
}
