# Caisson's build. 'make' builds bin/; 'make guest' makes what pods boot, into build/guest.
export CGO_ENABLED := 0

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GOFLAGS := -trimpath -tags=containers_image_openpgp
LDFLAGS := -s -w -buildid= -X main.version=$(VERSION)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

# A kernel of one's own for the guest: make guest-kernel, then make guest KERNEL=build/guest-kernel.
KERNEL :=

.PHONY: all build agent guest guest-kernel lint clean

all: build

build: agent
	go build $(GOFLAGS) -ldflags '$(LDFLAGS)' -o bin/caissond ./cmd/caissond

agent:
	go build $(GOFLAGS) -buildvcs=false -ldflags '$(LDFLAGS)' -o bin/caisson-agent ./cmd/caisson-agent

# Kernel and initramfs from Debian packages; needs apt and dpkg-deb, changes nothing on the host.
guest: build
	bin/caissond guest build --output build/guest --agent bin/caisson-agent --kernel "$(KERNEL)"

# The guest's kernel from Debian's source package, small, with its drivers built in. Takes minutes.
guest-kernel:
	podvm/guestimage/kernel/build.sh build/guest-kernel build/linux

lint:
	@test -z "$$(gofmt -l .)" || { gofmt -d .; exit 1; }
	go vet -tags containers_image_openpgp ./...
	go run $(STATICCHECK) -tags containers_image_openpgp ./...

clean:
	rm -rf bin build
