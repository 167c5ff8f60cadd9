package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	"golang.org/x/sys/unix"
)

const metricsAddr = "127.0.0.1:19477"

// TestPrometheus has a real Prometheus scrape the daemon, and promtool judge what it says.
func TestPrometheus(t *testing.T) {
	d := harness.Start(t, func(c *harness.Config) { c.Metrics.Listen = metricsAddr })
	d.RunPod().Run(images.Busybox, sleeper)
	text, err := page("http://" + metricsAddr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	check := exec.Command("promtool", "check", "metrics")
	check.Stdin = strings.NewReader(text)
	if out, err := check.CombinedOutput(); err != nil || len(bytes.TrimSpace(out)) > 0 {
		t.Errorf("promtool: %v\n%s", err, out)
	}
	prometheus(t)
	for query, want := range map[string]string{
		`up{job="caisson"}`:                                                                               "1",
		`sum(caisson_pods{state="ready"})`:                                                                "1",
		`sum(caisson_containers{state="running"})`:                                                        "1",
		`sum(caisson_vmm_memory_bytes) > bool 1e6`:                                                        "1",
		`sum(caisson_vmm_cpu_seconds_total) > bool 0`:                                                     "1",
		`sum(caisson_images) > bool 0`:                                                                    "1",
		`sum(caisson_image_store_bytes) > bool 1e6`:                                                       "1",
		`sum(caisson_cri_request_duration_seconds_count{method="RunPodSandbox",code="OK"})`:               "1",
		`count(count by (phase) (caisson_pod_start_phase_duration_seconds_count)) > bool 2`:               "1",
		`histogram_quantile(0.5, sum by (le) (caisson_pod_start_phase_duration_seconds_bucket)) > bool 0`: "1",
	} {
		harness.Eventually(t, query, func() error {
			got, err := ask(query)
			if err == nil && got != want {
				err = fmt.Errorf("got %q, want %q", got, want)
			}
			return err
		})
	}
}

// prometheus runs a server that scrapes the daemon every second, until the test ends.
func prometheus(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "prometheus.yml")
	text := "global: {scrape_interval: 1s}\nscrape_configs:\n- job_name: caisson\n  static_configs: [{targets: ['" + metricsAddr + "']}]\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	server := exec.Command("prometheus", "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address=127.0.0.1:19090")
	server.Stdout, server.Stderr = &out, &out
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Process.Signal(unix.SIGTERM); err != nil {
			t.Error(err)
		}
		_ = server.Wait()
		if t.Failed() {
			t.Logf("Prometheus:\n%s", out.String())
		}
	})
}

// ask is the value of a query with one result.
func ask(query string) (string, error) {
	body, err := page("http://127.0.0.1:19090/api/v1/query?query=" + url.QueryEscape(query))
	if err != nil {
		return "", err
	}
	var answer struct {
		Data struct {
			Result []struct{ Value [2]any }
		}
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || len(answer.Data.Result) != 1 {
		return "", fmt.Errorf("answer %s, %w", body, err)
	}
	return fmt.Sprint(answer.Data.Result[0].Value[1]), nil
}
