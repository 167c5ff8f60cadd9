package server

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The kernel's real-time signals as C libraries number them.
const sigRTMin, sigRTMax = 34, 64

// stopSignal is the name of the signal the pod asks for, else the image's, else SIGTERM.
func stopSignal(asked cri.Signal, image string) (string, error) {
	if asked == cri.Signal_SIGNAL_RUNTIME_DEFAULT {
		if image == "" {
			return "SIGTERM", nil
		}
		s, err := parseSignal(image)
		if err != nil {
			return "", fmt.Errorf("the image's stop signal: %w", err)
		}
		return signalName(s), nil
	}
	if _, ok := cri.Signal_name[int32(asked)]; !ok {
		return "", invalid("stop signal %d is unknown", asked)
	}
	return signalName(asked), nil
}

// oneName are the signals that have several names, by the one that is used here.
var oneName = map[cri.Signal]string{
	cri.Signal_SIGNAL_SIGCLD:   "SIGCHLD",
	cri.Signal_SIGNAL_SIGIOT:   "SIGABRT",
	cri.Signal_SIGNAL_SIGPOLL:  "SIGIO",
	cri.Signal_SIGNAL_SIGRTMIN: "SIGRTMIN+0",
	cri.Signal_SIGNAL_SIGRTMAX: "SIGRTMAX-0",
}

// signalName is "SIGTERM", "SIGRTMIN+3" for the CRI's SIGNAL_SIGTERM, SIGNAL_SIGRTMINPLUS3.
func signalName(s cri.Signal) string {
	if name, ok := oneName[s]; ok {
		return name
	}
	name := strings.TrimPrefix(s.String(), "SIGNAL_")
	name = strings.Replace(name, "PLUS", "+", 1)
	return strings.Replace(name, "MINUS", "-", 1)
}

// parseSignal reads a signal as images write it: "SIGTERM", "term", "RTMIN+3" or "15".
func parseSignal(s string) (cri.Signal, error) {
	name := strings.ToUpper(s)
	if n, err := strconv.Atoi(s); err == nil {
		name = signalByNumber(n)
	}
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	name = strings.TrimSuffix(strings.TrimSuffix(name, "+0"), "-0")
	name = strings.Replace(name, "+", "PLUS", 1)
	name = strings.Replace(name, "-", "MINUS", 1)
	v, ok := cri.Signal_value["SIGNAL_"+name]
	if !ok {
		return 0, invalid("signal %q is unknown", s)
	}
	return cri.Signal(v), nil
}

// signalByNumber is "SIGTERM" for 15, "SIGRTMIN+1" for 35, "" for a number that is no signal's.
func signalByNumber(n int) string {
	switch {
	case n == sigRTMin:
		return "SIGRTMIN"
	case n == sigRTMax:
		return "SIGRTMAX"
	case n > sigRTMin && n <= sigRTMin+15:
		return fmt.Sprintf("SIGRTMIN+%d", n-sigRTMin)
	case n > sigRTMin && n < sigRTMax:
		return fmt.Sprintf("SIGRTMAX-%d", sigRTMax-n)
	}
	return unix.SignalName(unix.Signal(n))
}
