package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// run is a container under test.
type run struct {
	t   *testing.T
	ctx context.Context
	c   *agent.Client
	id  string
}

// specOf is a spec as the host makes it.
func specOf(args ...string) *specs.Spec {
	all := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SYS_PTRACE"}
	return &specs.Spec{Process: &specs.Process{
		Args: args, Env: []string{"PATH=/bin"}, Cwd: "/",
		Capabilities: &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all},
	}}
}

func create(t *testing.T, ctx context.Context, c *agent.Client, id string, spec *specs.Spec, req *agent.CreateRequest) (*run, *agent.CreateResponse) {
	t.Helper()
	r, resp, err := tryCreate(t, ctx, c, id, spec, req)
	if err != nil {
		t.Fatal(err)
	}
	return r, resp
}

func tryCreate(t *testing.T, ctx context.Context, c *agent.Client, id string, spec *specs.Spec, req *agent.CreateRequest) (*run, *agent.CreateResponse, error) {
	t.Helper()
	b, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	req.Id, req.Spec = id, b
	if req.Rootfs == nil {
		req.Rootfs = &agent.Rootfs{ImageAddr: testImage}
	}
	resp, err := service1(t, ctx, c).Create(ctx, req)
	return &run{t, ctx, c, id}, resp, err
}

func (r *run) start() *run {
	r.t.Helper()
	if _, err := service1(r.t, r.ctx, r.c).Start(r.ctx, &agent.StartRequest{Id: r.id}); err != nil {
		r.t.Fatal(err)
	}
	return r
}

// wait waits for the exit.
func (r *run) wait() *agent.ContainerState {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	w, err := service1(r.t, r.ctx, r.c).Watch(ctx, &agent.WatchRequest{})
	if err != nil {
		r.t.Fatal(err)
	}
	for {
		s, err := w.Recv()
		if err != nil {
			r.t.Fatal(err)
		}
		if s.Id == r.id && s.State == agent.State_STATE_EXITED {
			return s
		}
	}
}

// logs reads all output until the container's end, and acknowledges it as it goes.
func (r *run) logs() (stdout, stderr string) {
	r.t.Helper()
	o, err := r.c.Output(r.ctx, r.id, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	defer o.Close()
	var out, errs strings.Builder
	for n := 1; ; n++ {
		rec, err := o.Next()
		if err == io.EOF {
			return out.String(), errs.String()
		} else if err != nil {
			r.t.Fatal(err)
		}
		w := &out
		if rec.Stderr {
			w = &errs
		}
		w.Write(rec.Line)
		if !rec.Partial {
			w.WriteByte('\n')
		}
		if n%500 == 0 {
			if err := o.Ack(rec.Offset + agent.RecordSize(len(rec.Line))); err != nil {
				r.t.Fatal(err)
			}
		}
	}
}

func (r *run) exec(stdin io.Reader, args ...string) (code int32, stdout, stderr string) {
	r.t.Helper()
	p, err := json.Marshal(map[string]any{"args": args})
	if err != nil {
		r.t.Fatal(err)
	}
	var out, errs bytes.Buffer
	code, err = r.c.Exec(r.ctx, agent.Exec{Container: r.id, Process: p}, agent.IO{Stdin: stdin, Stdout: &out, Stderr: &errs})
	if err != nil {
		r.t.Fatal(err)
	}
	return code, out.String(), errs.String()
}

func (r *run) remove() {
	r.t.Helper()
	if _, err := service1(r.t, r.ctx, r.c).Remove(r.ctx, &agent.RemoveRequest{Id: r.id}); err != nil {
		r.t.Fatal(err)
	}
}

func TestContainerLife(t *testing.T) {
	ctx, c := startAgent(t)
	r, resp := create(t, ctx, c, "one", specOf("sh", "-c", "echo out; echo err >&2; hostname; cat /etc/resolv.conf /etc/hostname; cat /proc/sys/kernel/random/boot_id | wc -c; exit 3"), &agent.CreateRequest{})
	if resp.Uid != 0 || resp.Gid != 0 || len(resp.Groups) != 2 {
		t.Errorf("user: %v", resp)
	}
	if _, err := c.Exec(ctx, agent.Exec{Container: "one", Process: []byte(`{"args":["true"]}`)}, agent.IO{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec before the start: %v", err)
	}
	r.start()
	s := r.wait()
	if s.ExitCode != 3 || s.FinishedNs < s.StartedNs || s.StartedNs == 0 || s.OomKilled {
		t.Errorf("got %v", s)
	}
	out, errs := r.logs()
	if want := "out\nweb-1\nnameserver 10.0.0.10\nsearch a.svc b\nweb-1\n37\n"; out != want || errs != "err\n" {
		t.Errorf("got %q and %q", out, errs)
	}
	if _, err := service1(t, ctx, c).Start(ctx, &agent.StartRequest{Id: "one"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a second start: %v", err)
	}
	if _, err := service1(t, ctx, c).Signal(ctx, &agent.SignalRequest{Id: "one", Signal: 15}); err != nil {
		t.Errorf("a signal after the end: %v", err)
	}
	r.remove()
	r.remove()
	if _, err := c.Output(ctx, "one", 0); !errdefs.IsNotFound(err) {
		t.Errorf("output of a removed container: %v", err)
	}
	// Its id is free again.
	r, _ = create(t, ctx, c, "one", specOf("sleep", "1000"), &agent.CreateRequest{})
	if _, _, err := tryCreate(t, ctx, c, "one", specOf("true"), &agent.CreateRequest{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create twice: %v", err)
	}
	r.start()
	if _, err := service1(t, ctx, c).Signal(ctx, &agent.SignalRequest{Id: "one", Signal: 9}); err != nil {
		t.Fatal(err)
	}
	if s := r.wait(); s.ExitCode != 137 {
		t.Errorf("killed: %v", s)
	}
	r.remove()
}

func TestCreateFails(t *testing.T) {
	ctx, c := startAgent(t)
	for name, test := range map[string]struct {
		spec *specs.Spec
		req  *agent.CreateRequest
		is   func(error) bool
		text string
	}{
		"no command": {specOf(), &agent.CreateRequest{}, errdefs.IsInvalidArgument, "no command"},
		"no user":    {specOf("true"), &agent.CreateRequest{User: &agent.User{Name: "nobody-here"}}, errdefs.IsInvalidArgument, "nobody-here"},
		"no disk":    {specOf("true"), &agent.CreateRequest{Rootfs: &agent.Rootfs{ImageAddr: "usb:1"}}, errdefs.IsInvalidArgument, "usb:1"},
		"no image":   {specOf("true"), &agent.CreateRequest{Rootfs: &agent.Rootfs{}}, errdefs.IsInvalidArgument, "no image"},
		"relative":   {specOf("true"), &agent.CreateRequest{Mounts: []*agent.Mount{{Destination: "x"}}}, errdefs.IsInvalidArgument, "absolute"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := tryCreate(t, ctx, c, "bad", test.spec, test.req)
			if err == nil || !test.is(err) || !strings.Contains(err.Error(), test.text) {
				t.Errorf("got %v", err)
			}
		})
	}
	if _, _, err := tryCreate(t, ctx, c, "../x", specOf("true"), &agent.CreateRequest{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v", err)
	}
	r, _ := create(t, ctx, c, "bad", specOf("true"), &agent.CreateRequest{})
	r.remove()
}

// TestStartFails: what crun makes of a container is told when it is started, and is its end.
func TestStartFails(t *testing.T) {
	ctx, c := startAgent(t)
	s := service1(t, ctx, c)
	tty := specOf("nope")
	tty.Process.Terminal = true
	nowhere := specOf("true")
	nowhere.Mounts = []specs.Mount{{Destination: "/x", Type: "bind", Source: "/does not exist", Options: []string{"bind"}}}
	for name, test := range map[string]struct {
		spec *specs.Spec
		is   func(error) bool
		text string
	}{
		"no executable": {specOf("nope"), errdefs.IsNotFound, `exec: "nope": executable file not found in $PATH`},
		"with terminal": {tty, errdefs.IsNotFound, `exec: "nope": executable file not found in $PATH`},
		"no path":       {specOf("/nope"), errdefs.IsNotFound, "/nope"},
		"no source":     {nowhere, func(err error) bool { return !errdefs.IsFailedPrecondition(err) }, "/does not exist"},
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := create(t, ctx, c, "bad", test.spec, &agent.CreateRequest{})
			if _, err := s.Update(ctx, &agent.UpdateRequest{Id: "bad", Resources: []byte("{}")}); err != nil {
				t.Errorf("update: %v", err)
			}
			_, err := s.Start(ctx, &agent.StartRequest{Id: "bad"})
			if err == nil || !test.is(err) || !strings.Contains(err.Error(), test.text) {
				t.Errorf("got %v", err)
			}
			if e := r.wait(); e.ExitCode != 128 || e.StartedNs != 0 || e.FinishedNs == 0 {
				t.Errorf("got %v", e)
			}
			r.logs() // they end; what is in them is crun's
			r.remove()
		})
	}
	// One that is never started can be killed and removed.
	r, _ := create(t, ctx, c, "bad", specOf("nope"), &agent.CreateRequest{})
	if _, err := s.Signal(ctx, &agent.SignalRequest{Id: "bad", Signal: 9, All: true}); err != nil {
		t.Error(err)
	}
	r.wait()
	r.remove()
	r, _ = create(t, ctx, c, "bad", specOf("nope"), &agent.CreateRequest{})
	r.remove()
}

// TestRehearse: what is left of a rehearsal is in caches alone.
func TestRehearse(t *testing.T) {
	ctx, c := bareAgent(t)
	s := service1(t, ctx, c)
	spec, err := json.Marshal(specOf("nothing"))
	if err != nil {
		t.Fatal(err)
	}
	request := &agent.RehearseRequest{Spec: spec}
	if _, err := s.Rehearse(ctx, request); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("before it was prepared: %v", err)
	}
	if _, err := s.Prepare(ctx, &agent.PrepareRequest{}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := s.Rehearse(ctx, request); err != nil {
			t.Fatal(err)
		}
	}
	if stats, err := s.Stats(ctx, &agent.StatsRequest{}); err != nil || len(stats.Containers) > 0 {
		t.Errorf("a rehearsal leaves %v, %v", stats, err)
	}
	if _, err := s.Setup(ctx, setupRequest()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Rehearse(ctx, request); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("after it was set up: %v", err)
	}
	r, _ := create(t, ctx, c, "one", specOf("true"), &agent.CreateRequest{})
	r.start().wait()
	r.remove()
}

// TestRehearseStart: the container is left as it is in a pod.
func TestRehearseStart(t *testing.T) {
	ctx, c := bareAgent(t)
	s := service1(t, ctx, c)
	spec, err := json.Marshal(specOf("sleep", "1000"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prepare(ctx, &agent.PrepareRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Rehearse(ctx, &agent.RehearseRequest{Spec: spec, Rootfs: &agent.Rootfs{ImageAddr: testImage}}); err != nil {
		t.Fatal(err)
	}
	if stats, err := s.Stats(ctx, &agent.StatsRequest{}); err != nil || len(stats.Containers) != 1 {
		t.Errorf("it leaves %v, %v", stats, err)
	}
}

func TestExec(t *testing.T) {
	ctx, c := startAgent(t)
	r, _ := create(t, ctx, c, "one", specOf("sleep", "1000"), &agent.CreateRequest{User: &agent.User{Name: "web"}})
	r.start()
	code, out, errs := r.exec(nil, "sh", "-c", "id; echo $HOME; echo e >&2; exit 9")
	if code != 9 || out != "uid=1000(web) gid=1001(web) groups=1001(web),1002(log),1003(wheel)\n/home/web\n" || errs != "e\n" {
		t.Errorf("got %d, %q, %q", code, out, errs)
	}
	in := strings.Repeat("abcdefgh", 1<<17)
	if code, out, _ := r.exec(strings.NewReader(in), "cat"); code != 0 || out != in {
		t.Errorf("cat: %d, %d bytes of %d", code, len(out), len(in))
	}
	if code, _, _ := r.exec(nil, "sh", "-c", "kill -TERM $$"); code != 143 {
		t.Errorf("a killed process has code %d", code)
	}
	// What it leaves behind does not keep the exec open.
	if code, out, _ := r.exec(nil, "sh", "-c", "sleep 1000 & echo done"); code != 0 || out != "done\n" {
		t.Errorf("got %d, %q", code, out)
	}
	_, err := c.Exec(ctx, agent.Exec{Container: "one", Process: []byte(`{"args":["nope"]}`)}, agent.IO{})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `"nope": executable file not found in $PATH`) {
		t.Errorf("got %v", err)
	}
	var tty bytes.Buffer
	size := make(chan agent.WindowSize, 1)
	size <- agent.WindowSize{Width: 100, Height: 40}
	code, err = c.Exec(ctx, agent.Exec{Container: "one", TTY: true, Process: []byte(`{"args":["sh","-c","until [ \"$(stty size 2>&1)\" = \"40 100\" ]; do :; done; stty size; read x; echo got $x"]}`)},
		agent.IO{Stdin: strings.NewReader("typed\n"), Stdout: &tty, Resize: size})
	if err != nil || code != 0 || !strings.Contains(tty.String(), "40 100\r\n") || !strings.Contains(tty.String(), "got typed\r\n") {
		t.Errorf("terminal: %d, %v, %q", code, err, tty.String())
	}
	// Who gives up an exec ends its process.
	gone, cancel := context.WithCancel(ctx)
	pr, pw := io.Pipe()
	go func() { io.ReadFull(pr, make([]byte, 3)); cancel() }()
	if _, err := c.Exec(gone, agent.Exec{Container: "one", Process: []byte(`{"args":["sh","-c","echo up; exec sleep 2000"]}`)}, agent.IO{Stdout: pw}); err == nil {
		t.Error("an exec ended well that was given up")
	}
	for {
		if _, out, _ := r.exec(nil, "ps"); !strings.Contains(out, "sleep 2000") {
			break
		}
		if ctx.Err() != nil {
			t.Fatal("the process of an exec that was given up lives on")
		}
	}
	r.remove()
}

func TestOutputResumes(t *testing.T) {
	ctx, c := startAgent(t)
	// More than is kept: the container waits for acknowledgements.
	const lines = 200000
	r, _ := create(t, ctx, c, "one", specOf("sh", "-c", fmt.Sprintf("seq %d", lines)), &agent.CreateRequest{})
	r.start()
	want, offset := 1, uint64(0)
	for streams := 0; ; streams++ {
		o, err := c.Output(ctx, "one", offset)
		if err != nil {
			t.Fatal(err)
		}
		for n := 0; n < 30000; n++ {
			rec, err := o.Next()
			if err == io.EOF {
				if want != lines+1 || streams < 3 {
					t.Errorf("ended before line %d after %d streams", want, streams)
				}
				return
			} else if err != nil {
				t.Fatal(err)
			}
			if string(rec.Line) != fmt.Sprint(want) {
				t.Fatalf("got line %q where %d was due", rec.Line, want)
			}
			want++
			offset = rec.Offset + agent.RecordSize(len(rec.Line))
			if n%1000 == 0 {
				if err := o.Ack(offset); err != nil {
					t.Fatal(err)
				}
			}
		}
		o.Close()
	}
}

// TestWrittenFits: the end of a container brings no more of what it wrote than the host takes.
func TestWrittenFits(t *testing.T) {
	c := &container{a: &Agent{files: newFileSets(t.TempDir())}}
	for i := range agent.WrittenFiles + 10 {
		name := fmt.Sprint(i)
		path, err := c.a.files.put(t.Context(), &agent.Files{Name: name, Single: true, Files: []*agent.File{{Mode: 0o600}}})
		if err != nil {
			t.Fatal(err)
		}
		content := make([]byte, 1)
		if i < 4 {
			content = make([]byte, agent.WrittenMax)
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		c.writeback = append(c.writeback, name)
	}
	size, files := 0, c.written()
	for _, f := range files {
		size += len(f.Content)
	}
	if len(files) > agent.WrittenFiles || size != agent.WrittenAll {
		t.Errorf("%d files of %d bytes", len(files), size)
	}
	c.writeback = c.writeback[4:]
	if n := len(c.written()); n != agent.WrittenFiles {
		t.Errorf("%d small files", n)
	}
}
