package boot

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
)

const (
	balloonDriver = "/sys/bus/virtio/drivers/virtio_balloon"
	// balloonID is the balloon's number in the virtio specification, as sysfs shows it.
	balloonID = "0x0005"
)

// LeaveBalloon takes the driver from the balloon, by which the kernel tells the host what memory is free,
// until memory is plugged in. For a template: its clones would look through all their free memory when
// they have hardly begun, and report what is not theirs but the template's, which the host can't give back.
func LeaveBalloon() error {
	devices, err := filepath.Glob(filepath.Join(balloonDriver, "virtio*"))
	if err != nil {
		return err
	}
	for _, device := range devices {
		if err := write(filepath.Join(balloonDriver, "unbind"), filepath.Base(device)); err != nil {
			return fmt.Errorf("leave the balloon: %w", err)
		}
	}
	return nil
}

// takeBalloon gives the balloon its driver back.
func (g *Guest) takeBalloon() {
	g.balloon.Lock()
	defer g.balloon.Unlock()
	if err := bindBalloon(); err != nil {
		slog.Error("free memory does not go back to the host", "err", err)
	}
}

func bindBalloon() error {
	ids, err := filepath.Glob("/sys/bus/virtio/devices/*/device")
	if err != nil {
		return err
	}
	for _, file := range ids {
		id, err := os.ReadFile(file)
		if err != nil || strings.TrimSpace(string(id)) != balloonID {
			continue // unplugged meanwhile, or another device
		}
		device := filepath.Dir(file)
		if _, err := os.Lstat(filepath.Join(device, "driver")); err == nil {
			continue
		}
		if err := write(filepath.Join(balloonDriver, "bind"), filepath.Base(device)); err != nil {
			return fmt.Errorf("use the balloon: %w", err)
		}
	}
	return nil
}
