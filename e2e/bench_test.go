package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	"github.com/caisson-vm/caisson/e2e/measure"
	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/cloudhv"
	"github.com/caisson-vm/caisson/podvm/vmm/qemu"
)

// jsonVar names a file for the figures; idleVar is a number of idle pods; onlyVar restricts what is
// measured to some of "runc", "boot", "clone" and "warm", with commas between them.
const (
	jsonVar = "CAISSON_BENCH_JSON"
	idleVar = "CAISSON_BENCH_IDLE"
	onlyVar = "CAISSON_BENCH_ONLY"
)

func wanted(name string) bool {
	only := os.Getenv(onlyVar)
	return only == "" || slices.Contains(strings.Split(only, ","), name)
}

// BenchmarkPods measures a daemon whose pods are clones beside one whose pods boot and one that keeps a
// clone warm, beside the bare boot of their guest, and, where they are installed, beside containerd and runc. The number of
// iterations is the number of pods.
func BenchmarkPods(b *testing.B) {
	if trial(b) {
		return
	}
	o := measure.Options{Runs: b.N, Image: images.Busybox}
	fmt.Sscan(os.Getenv(idleVar), &o.Idle)
	switch {
	case !wanted("runc"):
	case harness.HasContainerd():
		o.Endpoints = append(o.Endpoints, measure.Endpoint{Name: "runc", Address: harness.StartContainerd(b)})
	default:
		b.Log("containerd and runc are not installed: not compared with them")
	}
	for _, kind := range []struct {
		name, template string
		warm           int
	}{{"boot", "pod", 0}, {"clone", "node", 0}, {"warm", "node", 1}} {
		if !wanted(kind.name) {
			continue
		}
		d := harness.Start(b, func(c *harness.Config) {
			c.VM.Template, c.VM.Warm = kind.template, kind.warm
			if kind.warm > 0 {
				c.Metrics.Listen = metricsAddr
			}
		})
		d.Pull(images.Busybox)
		d.RunPod().Remove() // its template is there now
		if _, learns := driverOf(b, d).(vmm.Learner); learns && kind.template == "node" {
			if err := d.AwaitTaught(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
		e := measure.Endpoint{Name: kind.name, Address: "unix://" + d.Config.Listen}
		if kind.template != "pod" {
			e.Against = "boot"
		} else {
			driver := driverOf(b, d)
			e.Boot = func(ctx context.Context) error { return bareBoot(ctx, b, driver) }
		}
		if kind.warm > 0 {
			e.Settle = func(ctx context.Context) error { return d.AwaitWarm(ctx, kind.warm) }
		}
		o.Endpoints = append(o.Endpoints, e)
	}
	b.ResetTimer()
	report, err := measure.Run(b.Context(), o)
	b.StopTimer()
	if err != nil {
		b.Fatal(err)
	}
	fmt.Printf("\n%s\n", report) // a benchmark's log is cut short
	if file := os.Getenv(jsonVar); file != "" {
		data, err := json.MarshalIndent(report, "", "  ")
		if err := errors.Join(err, os.WriteFile(file, data, 0o644)); err != nil {
			b.Fatal(err)
		}
	}
}

// trial tells whether this is the one iteration with which each benchmark begins, and not the number
// of them that was asked for.
func trial(b *testing.B) bool {
	asked := flag.Lookup("test.benchtime").Value.String()
	return b.N == 1 && strings.HasSuffix(asked, "x") && asked != "1x"
}

// driverOf is the driver that a daemon uses.
func driverOf(b *testing.B, d *harness.Daemon) vmm.Driver {
	status, err := d.Runtime().Status(b.Context(), &cri.StatusRequest{Verbose: true})
	if err != nil {
		b.Fatal(err)
	}
	var driver vmm.Driver
	accel := qemu.TCG
	switch name := status.Info["driver"]; {
	case strings.Contains(name, cloudhv.Name):
		driver, err = cloudhv.New(b.Context(), cloudhv.Name)
	case strings.Contains(status.Info["driverVersion"], string(qemu.KVM)):
		accel = qemu.KVM
		fallthrough
	default:
		driver, err = qemu.New(b.Context(), "qemu-system-x86_64", accel)
	}
	if err != nil {
		b.Fatal(err)
	}
	return driver
}

// bareBoot boots the guest with nothing of a pod, waits for its agent and ends it.
func bareBoot(ctx context.Context, b *testing.B, d vmm.Driver) (err error) {
	g, err := guestimage.Open(harness.Guest())
	if err != nil {
		return err
	}
	size := vmm.Size{CPUs: 1, Memory: 256 << 20}
	v, err := d.Launch(ctx, vmm.Config{
		ID: "bare", Dir: harness.Scratch(b), Kernel: g.Kernel, Initrd: g.Initrd, Cmdline: g.Cmdline, Size: size, Max: size,
	})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, v.Kill(ctx))
	}()
	conn, err := v.Dial(ctx, vmm.AgentPort)
	if err != nil {
		return err
	}
	return conn.Close()
}

// readAll reads every file of a container's image, and nothing else.
const readAll = "find / -xdev -type f -exec cat {} + >/dev/null"

// BenchmarkImages has pods of one image read all of it, with its pages shared by DAX, where the driver
// can, and with a copy in each guest. The number of iterations is the number of pods beside one another.
func BenchmarkImages(b *testing.B) {
	if trial(b) {
		return
	}
	for _, dax := range []bool{true, false} {
		d := harness.Start(b, func(c *harness.Config) { c.VM.DAX = dax })
		if name := driverOf(b, d).Name(); dax && name != cloudhv.Name {
			fmt.Printf("images by DAX: not measured, %s can't\n", name)
			continue
		}
		var pods []*harness.Container
		for range b.N {
			pods = append(pods, d.RunPod().Run(images.Nginx, harness.Shell("exec sleep 3600")))
		}
		var first, second time.Duration
		for _, c := range pods {
			start := time.Now()
			c.Exec("sh", "-c", readAll)
			read := time.Now()
			c.Exec("sh", "-c", readAll)
			first += read.Sub(start)
			second += time.Since(read)
		}
		var pss float64
		for _, c := range pods {
			w, err := measure.Weigh(c.Pod.ID)
			if err != nil {
				b.Fatal(err)
			}
			pss += w.PSS
		}
		n := float64(b.N)
		fmt.Printf("DAX %v, %d pods: %.1f MiB PSS per pod, first read %.0f ms, second %.0f ms\n", dax, b.N, pss/n/(1<<20),
			first.Seconds()*1000/n, second.Seconds()*1000/n)
		for _, c := range pods {
			c.Pod.Remove()
		}
	}
}
