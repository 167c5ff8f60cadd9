package imagestore

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// TestHugeAnswers: the body of an error answer is read whole by the library, and ends the process that reads it.
func TestHugeAnswers(t *testing.T) {
	r := newTestRegistry(t)
	s := newStore(t)
	s.pullMemory = 256 << 20
	r.push("a", small("x"))
	piece := make([]byte, 1<<20)
	for name, path := range map[string]string{"manifest": "/manifests/", "blob": "/blobs/"} {
		for status, kind := range map[int]string{http.StatusNotFound: "text/html", http.StatusForbidden: "application/json"} {
			sent := 0
			ended := make(chan struct{})
			r.on(func(w http.ResponseWriter, req *http.Request) bool {
				if !strings.Contains(req.URL.Path, path) {
					return false
				}
				defer close(ended)
				w.Header().Set("Content-Type", kind)
				w.WriteHeader(status)
				for sent < 8<<10 {
					if _, err := w.Write(piece); err != nil {
						break
					}
					sent++
				}
				return true
			})
			took := allocated(func() {
				_, err := s.Pull(t.Context(), r.host+"/a:1", nil)
				if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "have the registry checked") {
					t.Errorf("%s, %d: %v", name, status, err)
				}
				<-ended
			})
			if t.Logf("%s, %d: %d MiB were sent, %d KiB allocated", name, status, sent, took>>10); took > 8<<20 || sent >= 8<<10 {
				t.Errorf("%s, %d: %d bytes were allocated here, of %d MiB", name, status, took, sent)
			}
		}
	}
	if l := leftovers(t, s); l != "" {
		t.Errorf("left behind: %s", l)
	}
	r.on(func(http.ResponseWriter, *http.Request) bool { return false })
	mustPull(t, s, r.host+"/a:1")
}

// TestHostilePuller has a process that says what it may not: nothing of it becomes part of the store.
func TestHostilePuller(t *testing.T) {
	config := `{"os":"linux"}`
	good, other := digest.FromString(config).String(), digest.FromString("x").String()
	found := func(d, c string, total int64) string {
		return fmt.Sprintf(`{"Found":{"Digest":%q,"Config":%q,"Total":%d}}`+"\n", d, c, total)
	}
	start := found(other, good, 1)
	for name, test := range map[string]struct {
		says string // by the pipe for reports
		then string // a command
		kind func(error) bool
	}{
		"nothing":            {"", "exit 0", errdefs.IsInternal},
		"no JSON":            {"hello\n", "", errdefs.IsInternal},
		"an empty line":      {"\n", "", errdefs.IsInternal},
		"no report":          {"{}\n[]\n", "", errdefs.IsInternal},
		"two in a line":      {`{"Done":true}{"Done":true}` + "\n", "", errdefs.IsInternal},
		"unknown field":      {`{"Ready":true}` + "\n", "", errdefs.IsInternal},
		"a line without end": {strings.Repeat("x", maxLine+1), "", errdefs.IsInternal},
		"an end too early":   {`{"Done":true}` + "\n", "", errdefs.IsInternal},
		"no digest":          {found("x", good, 1), "", errdefs.IsInternal},
		"no id":              {found(other, "sha256:../../etc/passwd", 1), "", errdefs.IsInternal},
		"size below 0":       {found(other, good, -1), "", errdefs.IsInternal},
		"huge":               {found(other, good, 1<<60), "", errdefs.IsInternal},
		"no space for it":    {found(other, good, maxBytes), "", errdefs.IsResourceExhausted},
		"another name":       {found(good, good, 1), "", errdefs.IsInternal},
		"found twice":        {start + start, "", errdefs.IsInternal},
		"large config":       {start + fmt.Sprintf("{\"Config\":%d}\n", maxConfig+1), "", errdefs.IsInternal},
		"config of -1":       {start + "{\"Config\":-1}\n", "", errdefs.IsInternal},
		"half a config":      {start + "{\"Config\":14}\n{", "exit 1", errdefs.IsInternal},
		"another config":     {start + "{\"Config\":2}\n{}", "", errdefs.IsDataLoss},
		"counts back":        {"{\"Downloaded\":2}\n{\"Downloaded\":1}\n", "", errdefs.IsInternal},
		"counts below 0":     {"{\"Unpacked\":-1}\n", "", errdefs.IsInternal},
		"its end":            {start + "{\"Config\":14}\n" + config, "kill -9 $$", errdefs.IsResourceExhausted},
		"a kind":             {`{"Failed":{"Text":"no","Kinds":["NotFound","Unknown"]}}` + "\n", "", errdefs.IsNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			says := filepath.Join(t.TempDir(), "says")
			writeFile(t, says, test.says)
			if test.then == "" {
				test.then = "exec sleep 1000"
			}
			s := newStore(t, func(o *Options) {
				o.Puller = []string{"/bin/sh", "-c", "cat " + says + " >&4; " + test.then}
			})
			_, err := s.Pull(t.Context(), "r.example/a@"+other, nil)
			if !test.kind(err) {
				t.Errorf("got %v", err)
			}
			if l := leftovers(t, s); l != "" || len(s.Images()) != 0 {
				t.Errorf("left behind: %s", l)
			}
		})
	}
}

// TestPullerSaysMuch: what a process says for the log, or of its failure, is bounded.
func TestPullerSaysMuch(t *testing.T) {
	says := filepath.Join(t.TempDir(), "says")
	writeFile(t, says, strings.Repeat(`{"Log":{"Level":"WARN","Text":"x","Attrs":["odd"]}}`+"\n", 2*maxLogged)+`{"Failed":{"Text":"`+strings.Repeat("x", 10*maxText)+`"}}`+"\n")
	s := newStore(t, func(o *Options) { o.Puller = []string{"/bin/sh", "-c", "cat " + says + " >&4"} })
	log := logged(t)
	_, err := s.Pull(t.Context(), "r.example/a", nil)
	if err == nil || len(err.Error()) > maxText+100 {
		t.Errorf("got %v", err)
	}
	if n := strings.Count(log.String(), "msg=x"); n != maxLogged {
		t.Errorf("%d lines", n)
	}
}

func FuzzReports(f *testing.F) {
	id := digest.FromString("x").String()
	f.Add([]byte(`{"Found":{"Digest":"` + id + `","Config":"` + id + `","Total":1}}` + "\n" + `{"Log":{"Level":"WARN","Text":"x","Attrs":["a","b"]}}` + "\n"))
	f.Add([]byte(`{"Failed":{"Text":"no","Kinds":["NotFound"]},"Downloaded":1}` + "\n"))
	r := newRegistries(Options{}, f.TempDir())
	n, err := r.resolve("r.example/a@" + id)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, said []byte) {
		p := &puller{name: n}
		for in := bufio.NewReaderSize(bytes.NewReader(said), maxLine); ; {
			r, err := readReport(in)
			if err != nil || p.count(r) != nil {
				return
			}
			if r.Failed != nil && len(r.Failed.err().Error()) > 4*maxText {
				t.Errorf("an error of %d bytes", len(r.Failed.err().Error()))
			}
			if r.Found != nil && r.Found.check(n) == nil && (r.Found.Digest.String() != id || strings.Contains(r.Found.Config.Encoded(), "/")) {
				t.Errorf("found %+v", r.Found)
			}
		}
	})
}

// hanging is a registry that stands still in a layer, of an image that it returns the name of. in is closed as
// soon as it does, and gone when who asked has gone.
func hanging(t *testing.T) (ref string, in, gone chan struct{}) {
	r := newTestRegistry(t)
	i := large(1, 1)
	r.push("a", i)
	in, gone = make(chan struct{}), make(chan struct{})
	r.on(onBlob(gzipped(i.layers[0]), func(_ http.ResponseWriter, req *http.Request) {
		close(in)
		<-req.Context().Done()
		close(gone)
	}))
	return r.host + "/a:1", in, gone
}

// TestProcessOfPull looks at the process: what it may do, and what others see of it.
func TestProcessOfPull(t *testing.T) {
	ref, in, gone := hanging(t)
	s := newStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		_, err := s.Pull(ctx, ref, &Auth{Username: "me", Password: "s3cr3t"})
		ended <- err
	}()
	<-in
	out, err := exec.Command("pgrep", "-P", fmt.Sprint(os.Getpid()), processName).Output()
	if err != nil {
		t.Fatalf("no process: %v", err)
	}
	proc := filepath.Join("/proc", strings.TrimSpace(string(out)))
	for file, want := range map[string]string{
		"oom_score_adj": "1000\n", "limits": fmt.Sprintf("Max data size             %d", int64(pullMemory)),
		"status": "NoNewPrivs:\t1\n", "cmdline": testPuller[1], "environ": "PATH=",
	} {
		data, err := os.ReadFile(filepath.Join(proc, file))
		if err != nil || !strings.Contains(string(data), want) || strings.Contains(string(data), "s3cr3t") {
			t.Errorf("%s: %s, %v", file, data, err)
		}
		if file == "status" && !strings.Contains(string(data), "CapEff:\t0000000000000004\n") {
			t.Errorf("it has other capabilities than to read the node's configuration: %s", data)
		}
	}
	if left := leftovers(t, s); !strings.Contains(left, "staging/pull-") {
		t.Errorf("there is %s", left)
	}
	cancel()
	<-ended
	<-gone
	s.Close()
	if left := leftovers(t, s); left != "" {
		t.Errorf("left behind: %s", left)
	}
}

// TestPullEndsWithTheDaemon has a process that pulls and is killed.
func TestPullEndsWithTheDaemon(t *testing.T) {
	ref, in, gone := hanging(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "CAISSON_TEST_PULL="+ref, "CAISSON_TEST_ROOT="+t.TempDir())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-in
	cmd.Process.Kill()
	cmd.Wait()
	select {
	case <-gone:
	case <-time.After(20 * time.Second):
		t.Error("the process of the pull runs on")
	}
}
