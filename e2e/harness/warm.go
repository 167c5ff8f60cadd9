package harness

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"time"
)

// AwaitWarm waits until the daemon, which must serve metrics, has n clones ready.
func (d *Daemon) AwaitWarm(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	want := fmt.Sprintf("\ncaisson_warm_clones %d\n", n)
	for {
		text, err := d.metrics(ctx)
		if err != nil {
			return fmt.Errorf("wait for warm clones: %w", err)
		}
		if strings.Contains(text, want) {
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond): // nobody tells
		case <-ctx.Done():
			return fmt.Errorf("wait for warm clones: %w", ctx.Err())
		}
	}
}

// AwaitTaught waits until the daemon's template knows what its clones write.
func (d *Daemon) AwaitTaught(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	for {
		if found, err := filepath.Glob(filepath.Join(d.Config.Root, "templates", "*", "written.json")); len(found) > 0 || err != nil {
			return err
		}
		select {
		case <-time.After(100 * time.Millisecond): // nobody tells
		case <-ctx.Done():
			return fmt.Errorf("wait for the template to be taught: %w", ctx.Err())
		}
	}
}

// metrics is the daemon's page.
func (d *Daemon) metrics(ctx context.Context) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+d.Config.Metrics.Listen+"/metrics", nil)
	if err != nil {
		return "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return string(text), err
}
