# Caisson's build. 'make' builds bin/; 'make guest' makes what pods boot, into build/guest.
export CGO_ENABLED := 0

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GOFLAGS := -trimpath -tags=containers_image_openpgp
LDFLAGS := -s -w -buildid= -X main.version=$(VERSION)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

# A kernel of one's own for the guest: make guest-kernel, then make guest KERNEL=build/guest-kernel.
KERNEL :=

# Debian's Go is too old; .ci/deps puts the right one here where it is needed.
export PATH := $(CURDIR)/build/go/bin:$(PATH)
export GOTOOLCHAIN ?= auto

.PHONY: all build agent guest guest-kernel deps prepare demo demo-clean test unit race e2e bench e2e-node kubelet lint clean

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
	@.ci/deps kernel
	podvm/guestimage/kernel/build.sh build/guest-kernel build/linux

# What building, demo and tests need of Debian. As root.
deps:
	@.ci/deps

# Images for registries of the tests' own, crictl and critest.
prepare:
	go run $(GOFLAGS) ./e2e/prepare

# Shows a pod in a VM, and takes everything away. DEMO=--keep leaves it running.
demo: deps
	@echo "building; the first time it takes some minutes"
	@$(MAKE) --no-print-directory build guest
	@go run $(GOFLAGS) ./e2e/prepare --only demo
	@go run $(GOFLAGS) ./e2e/demo $(DEMO)

demo-clean:
	@go run $(GOFLAGS) ./e2e/demo --clean

# All tests: of packages, of the VM drivers' contract, end to end with real VMs, and critest.
test:
	@.ci/deps test
	@echo "building; the first time it takes some minutes"
	@$(MAKE) --no-print-directory build guest prepare
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory e2e

# One package at a time: several of them boot VMs. Each in namespaces of its own, of which nothing may be left.
unit:
	go build $(GOFLAGS) -o build/tools/isolate ./e2e/isolate
	go test $(GOFLAGS) $(RACE) -exec $(CURDIR)/build/tools/isolate -p 1 -timeout 15m $$(go list $(GOFLAGS) ./... | grep -v -e /e2e$$ -e /e2e/critest$$ -e /e2e/kubelet$$ -e /build/)

# The same with Go's race detector, which needs a C compiler, and several times the memory. What it keeps
# from running is left out: a test that counts memory, and a process that can't be confined under it.
race:
	@$(MAKE) --no-print-directory unit CGO_ENABLED=1 RACE='-race -skip "TestPullNeedsLittleMemory|TestShare"'

e2e:
	go test $(GOFLAGS) -p 1 -count 1 -timeout 30m ./e2e ./e2e/critest

# The contract of VM drivers with Cloud Hypervisor, the end-to-end tests with it, and those with a
# kubelet, in an emulated node whose KVM works.
e2e-node:
	@command -v cloud-hypervisor >/dev/null || { echo "e2e-node: nothing is tested: there is no cloud-hypervisor in PATH; put a release of it there"; exit 1; }
	@.ci/deps node
	@$(MAKE) --no-print-directory build guest prepare kubelet
	@status=0; for what in contract suite kubelet; do go run $(GOFLAGS) ./e2e/node $$what -test.v || status=1; done; \
	go run $(GOFLAGS) ./e2e/node down; exit $$status

# The kubelet for the emulated node. Takes minutes.
kubelet:
	cd e2e/kubelet/tool && GOFLAGS= go build -trimpath -ldflags '-s -w -X k8s.io/component-base/version.gitVersion=v1.37.2' -o ../../../build/tools/kubelet k8s.io/kubernetes/cmd/kubelet

# Pods that are clones against pods that boot, PODS of each, IDLE more at once, and what images cost. With
# BENCH='--endpoint NAME=unix:///SOCKET ...' the runtimes at these CRI sockets against one another.
PODS := 10
IDLE := 20
bench: deps
	@$(MAKE) --no-print-directory build guest prepare
ifdef BENCH
	go run $(GOFLAGS) ./e2e/bench $(BENCH)
else
	CAISSON_BENCH_IDLE=$(IDLE) go test $(GOFLAGS) ./e2e -run '^$$' -bench 'Pods|Images' -benchtime $(PODS)x -timeout 60m
endif

lint:
	@test -z "$$(gofmt -l .)" || { gofmt -d .; exit 1; }
	go vet -tags containers_image_openpgp ./...
	go run $(STATICCHECK) -tags containers_image_openpgp ./...

clean:
	rm -rf bin build
