package network

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// The annotations by which a pod's traffic is shaped, in bits per second as a Kubernetes quantity.
const (
	ingressAnnotation = "kubernetes.io/ingress-bandwidth"
	egressAnnotation  = "kubernetes.io/egress-bandwidth"
)

// Bits per second that Kubernetes accepts.
const (
	minRate = 1e3
	maxRate = 1e15
)

// bandwidth is the capability of that name: rates in bits per second, bursts in bits.
// Source: CNI CONVENTIONS.md; the bandwidth plugin.
func bandwidth(annotations map[string]string) (map[string]any, error) {
	shape := map[string]any{}
	for _, d := range []struct{ annotation, name string }{{ingressAnnotation, "ingress"}, {egressAnnotation, "egress"}} {
		text, ok := annotations[d.annotation]
		if !ok {
			continue
		}
		rate, err := quantity(text)
		if err != nil {
			return nil, fmt.Errorf("annotation %s: %w", d.annotation, err)
		}
		if rate < minRate || rate > maxRate {
			return nil, fmt.Errorf("annotation %s: %q is not between 1k and 1P bits per second: %w", d.annotation, text, errdefs.ErrInvalidArgument)
		}
		shape[d.name+"Rate"] = uint64(rate)
		shape[d.name+"Burst"] = burst(rate)
	}
	return shape, nil
}

// burst is what may pass at once: a tenth of a second's worth, at least 128 KiB so that a
// segmentation-offloaded packet fits, at most what the plugin takes.
func burst(rate float64) uint64 {
	return uint64(min(max(rate/10, 8*128<<10), math.MaxInt32))
}

var suffixes = map[string]float64{
	"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
	"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50, "Ei": 1 << 60,
}

// quantity reads a Kubernetes quantity: a decimal number with a suffix or an exponent ("10M",
// "1.5Gi", "2e6").
func quantity(text string) (float64, error) {
	number := strings.TrimRight(text, "numkMGTPEKi")
	factor, ok := suffixes[text[len(number):]]
	if !ok || strings.ContainsAny(number, "xXpP_") { // ParseFloat takes more notations than Kubernetes
		return 0, fmt.Errorf("%q is not a quantity like 10M: %w", text, errdefs.ErrInvalidArgument)
	}
	value, err := strconv.ParseFloat(number, 64)
	if err != nil || math.IsNaN(value) || math.IsInf(value, 0) {
		return 0, fmt.Errorf("%q is not a quantity like 10M: %w", text, errdefs.ErrInvalidArgument)
	}
	return value * factor, nil
}
