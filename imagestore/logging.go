package imagestore

import (
	"context"
	"io"
	"log/slog"
	"sync"

	"github.com/sirupsen/logrus"
)

// bridge gives what containers/image has to say, by logrus, to the daemon's log.
type bridge struct{}

var levels = map[logrus.Level]slog.Level{
	logrus.PanicLevel: slog.LevelError, logrus.FatalLevel: slog.LevelError, logrus.ErrorLevel: slog.LevelError,
	logrus.WarnLevel: slog.LevelWarn, logrus.InfoLevel: slog.LevelInfo,
}

func (bridge) Levels() []logrus.Level {
	return []logrus.Level{logrus.PanicLevel, logrus.FatalLevel, logrus.ErrorLevel, logrus.WarnLevel, logrus.InfoLevel}
}

func (bridge) Fire(e *logrus.Entry) error {
	slog.Log(context.Background(), levels[e.Level], e.Message, "from", "containers/image")
	return nil
}

var bridgeLogs = sync.OnceFunc(func() {
	logrus.SetOutput(io.Discard)
	logrus.AddHook(bridge{})
})
