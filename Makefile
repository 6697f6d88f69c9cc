# Naru. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
MAKEFLAGS += --no-print-directory

GO        ?= go
PREFIX    ?= /usr/local
DESTDIR   ?=
SYSCONFDIR ?= /etc
UNITDIR   ?= $(PREFIX)/lib/systemd/system
CACHE     := $(or $(NARU_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/naru)
VERSION   ?= $(shell git describe --tags --dirty 2>/dev/null || echo 0.1.0-dev$$(git rev-parse --short HEAD 2>/dev/null | sed -n '/^[0-9a-f]*$$/s/^/+g/p'))
FUZZTIME  ?= 30s
ROUNDS    ?= 5
SYSCALLS  ?= 200
STORE     ?= 10000
STARTS    ?= 200
DURATION  ?= 10m

bin       := $(CURDIR)/bin
ldflags    = -s -w -X main.version=$(VERSION)
static     = CGO_ENABLED=0 $(CURDIR)/hack/gobuild.sh "$(1)" $(GO) build -trimpath -ldflags '$(ldflags)'
tool       = $(CURDIR)/hack/gobuild.sh "$(1)" $(GO) build -trimpath -buildvcs=false
needed_go := $(shell awk '$$1 == "go" {print $$2; exit}' go.mod)

export NARU_CACHE := $(CACHE)

##@ Build

.PHONY: build
build: check-go ## Build bin/naru and bin/naru-monitor, static, for this machine
	@mkdir -p $(bin)
	@$(call static,building naru $(VERSION)) -o $(bin)/naru ./cmd/shim
	@$(call static,building naru-monitor $(VERSION)) -o $(bin)/naru-monitor ./cmd/monitor

.PHONY: build-all
build-all: check-go ## Build both for amd64 and arm64, into bin/linux-ARCH/
	@for arch in amd64 arm64; do \
		mkdir -p $(bin)/linux-$$arch; \
		GOARCH=$$arch $(call static,building naru for linux/$$arch) -o $(bin)/linux-$$arch/naru ./cmd/shim; \
		GOARCH=$$arch $(call static,building naru-monitor for linux/$$arch) -o $(bin)/linux-$$arch/naru-monitor ./cmd/monitor; \
	done

##@ Try

.PHONY: demo
demo: check-root check-demo build demo-tools ## Run a pod of two containers from start to end; touches nothing on this machine
	@hack/demo.sh

##@ Test

.PHONY: test
test: check-root check-test build build-all lint critest critest-benchmark demo test-hack ## What CI runs: lint, critest, demo, then all Go tests with the race detector
	@echo "testing with the race detector"
	@$(GO) test -race -p 1 -timeout 15m ./...
	@echo "PASS: make test"

.PHONY: test-nightly
test-nightly: test critest-cni fuzz crash soak kubelet-e2e cluster-e2e test-vm test-cgroup2 test-oci ## make test, then critest with CNI, every fuzz target for FUZZTIME, crash, soak, the real kubelet, a cluster, the cgroup v2 machine, containers by runc
	@$(GO) test -race -count=3 -timeout 60m ./...
	@echo "PASS: make test-nightly"

.PHONY: test-release
test-release: ## make test-nightly with ten times the fuzzing, then the newer kernel and the benchmark against its targets
	@$(MAKE) test-nightly FUZZTIME=300s
	@$(MAKE) test-vm VM=backports
	@$(MAKE) bench ENFORCE=1
	@echo "PASS: make test-release"

.PHONY: unit
unit: check-go ## Go tests without the race detector (what needs root is skipped without root)
	@$(GO) test -timeout 15m ./...

.PHONY: race
race: check-go ## Go tests with the race detector; PKG=./pod/... for some of them
	@$(GO) test -race -timeout 15m $(or $(PKG),./...)

.PHONY: crash
crash: check-root check-test ## Break daemon and worker at every named step, in every way (POINTS='plan ': at those); SYSCALLS=2000 kills at system calls; STORE=10000 damaged state folders, STARTS=200 of them with the real daemon
	@NARU_STORE=$(STORE) $(GO) test -count=1 -timeout 60m -v -run '^TestDamagedStateFolders$$' ./pod
	@NARU_STARTS=$(STARTS) $(GO) test -count=1 -timeout 60m -v -run '^TestDamagedStarts$$' ./test/ring
	@NARU_CRASH=all NARU_POINTS='$(POINTS)' NARU_SYSCALLS=$(SYSCALLS) $(GO) test -count=1 -timeout 300m -v -run '^TestCrash' ./test/ring

.PHONY: soak
soak: check-root check-test ## Pods under the reference model's eyes while everything is killed and the disk fills up, for DURATION (10m)
	@NARU_SOAK=$(DURATION) $(GO) test -count=1 -timeout 300m -v -run '^TestSoak$$' ./test/ring

.PHONY: model
model: check-root check-test build cri-tools hack-tools ## The reference model of CRI judges naru, or PEER=containerd; DURATION=60s, KILL=2 kills the daemon every so many seconds
	@hack/model.sh

.PHONY: fuzz
fuzz: check-go ## Run every fuzz target for FUZZTIME (30s)
	@GO=$(GO) hack/fuzz.sh $(FUZZTIME)

.PHONY: test-hack
test-hack: check-go ## Tests of the test tools
	@cd hack && $(GO) vet ./... && $(GO) test ./...

.PHONY: lint
lint: check-go $(bin)/golangci-lint ## golangci-lint with the rules of .golangci.yml, gofmt, and a vet for arm64
	@echo "linting"
	@$(bin)/golangci-lint run ./...
	@GOARCH=arm64 $(GO) vet ./...

.PHONY: critest
critest: check-root check-test build cri-tools hack-tools ## Kubernetes' CRI conformance tests; FOCUS='text', PEER=containerd, HANDLER=runc, PARALLEL=2, CNI=1
	@hack/critest.sh

.PHONY: critest-cni
critest-cni: check-root check-test build cri-tools hack-tools ## The same with the pods' network made by Debian's CNI plugins
	@CNI=1 hack/critest.sh

.PHONY: test-oci
test-oci: check-root check-test build cri-tools hack-tools ## critest, and the tests of pods, with containers made by runc
	@HANDLER=runc hack/critest.sh
	@NARU_OCI=$$(command -v runc) $(GO) test -count=1 -timeout 20m -run 'TestPod' -skip '$(oci-differs)' ./test/ring

# What runc does in another way, as docs/operations.md says: checkpoints, bytes in
# the environment, mknod, owners in /dev of a user namespace.
oci-differs = TestPodCheckpointOff|TestPodExecSync/as_the|TestPodPrivileged/a_device|TestPodUserNamespace/files_of

.PHONY: critest-benchmark
critest-benchmark: check-root check-test build cri-tools hack-tools ## critest's own benchmarks, BENCHMARK=20 of each kind
	@BENCHMARK=$(or $(BENCHMARK),20) hack/critest.sh

.PHONY: kubelet-smoke
kubelet-smoke: check-root check-test build cri-tools hack-tools kubelet ## The real kubelet with a static pod: probes, restart, logs
	@hack/kubelet-smoke.sh

.PHONY: kubelet-e2e
kubelet-e2e: check-root check-test build cri-tools hack-tools kubelet ## The real kubelet and all that it asks of a runtime; writes bin/kubelet-e2e.md
	@hack/kubelet-e2e.sh

.PHONY: cluster-e2e
cluster-e2e: check-root check-test build hack-tools k8s-tools ## A cluster of two nodes on this machine, naru beneath; writes bin/cluster-e2e.md; REPLICAS=100 for the Deployment whose start is measured, PARTS=jobs,many for some parts
	@REPLICAS=$(REPLICAS) PARTS=$(PARTS) hack/cluster-e2e.sh

.PHONY: bench
bench: check-root check-test build hack-tools ## Compare with Debian's containerd and runc; ROUNDS=5, ENFORCE=1 fails on a missed target, DOC=1 writes docs/performance.md
	@ROUNDS=$(ROUNDS) ENFORCE=$(ENFORCE) DOC=$(DOC) hack/bench.sh

.PHONY: vm-image
vm-image: check-root ## Build the cgroup v2 test machine (Debian 12 under QEMU), once
	@hack/vm/image.sh $(or $(VM),bookworm)

.PHONY: test-vm
test-vm: vm-image build cri-tools hack-tools ## Demo, Go tests, the systemd unit and AppArmor specs inside the cgroup v2 machine
	@GO=$(GO) hack/vm/test.sh $(or $(VM),bookworm)

# The packages whose tests ask the kernel for what differs with the cgroup version.
kernel_tests := test/ring runtime/native runtime/cgroup runtime/stats

.PHONY: test-cgroup2
test-cgroup2: vm-image build cri-tools hack-tools ## critest whole and the Go tests with real cgroups, in the cgroup v2 machine; DRIVER=systemd|cgroupfs
	@GO=$(GO) PARTS="critest units" UNITS="$(kernel_tests)" NARU_CGROUP_DRIVER=$(or $(DRIVER),systemd) hack/vm/test.sh $(or $(VM),bookworm)

.PHONY: test-cgroup2-full
test-cgroup2-full: build cri-tools hack-tools ## test-cgroup2 on both kernels with both drivers; about two hours, its log is kept in the cache
	@log=$(CACHE)/test-cgroup2-full/$$(date -u +%Y%m%dT%H%M%S); mkdir -p $$log; rc=0; \
	for vm in bookworm backports; do for driver in systemd cgroupfs; do \
		echo "== $$vm, $$driver" | tee -a $$log/log; \
		OUT=$$log/$$vm-$$driver $(MAKE) test-cgroup2 VM=$$vm DRIVER=$$driver 2>&1 | tee -a $$log/log || rc=1; \
	done; done; \
	echo "the log is $$log/log"; exit $$rc

##@ Install

.PHONY: install
install: ## Install to PREFIX (/usr/local), DESTDIR honoured; existing configuration is kept
	@[ -x $(bin)/naru ] || { echo "run make build first (as the user who has Go)" >&2; exit 1; }
	install -D -m 0755 $(bin)/naru $(DESTDIR)$(PREFIX)/bin/naru
	install -D -m 0755 $(bin)/naru-monitor $(DESTDIR)$(PREFIX)/bin/naru-monitor
	install -d -m 0755 $(DESTDIR)$(UNITDIR)
	for u in naru.service naru-monitor.service; do \
		sed 's|@PREFIX@|$(PREFIX)|g; s|@SYSCONFDIR@|$(SYSCONFDIR)|g' packaging/$$u >$(DESTDIR)$(UNITDIR)/$$u; \
		chmod 0644 $(DESTDIR)$(UNITDIR)/$$u; \
	done
	install -d -m 0755 $(DESTDIR)$(SYSCONFDIR)/naru/config.d $(DESTDIR)$(SYSCONFDIR)/naru/certs.d
	[ -e $(DESTDIR)$(SYSCONFDIR)/naru/config.toml ] || { $(bin)/naru config default >$(DESTDIR)$(SYSCONFDIR)/naru/config.toml && chmod 0600 $(DESTDIR)$(SYSCONFDIR)/naru/config.toml; }
	[ -e $(DESTDIR)$(SYSCONFDIR)/crictl.yaml ] || install -D -m 0644 packaging/crictl.yaml $(DESTDIR)$(SYSCONFDIR)/crictl.yaml
	install -D -m 0644 packaging/apparmor/naru-default $(DESTDIR)$(SYSCONFDIR)/apparmor.d/naru-default
	install -D -m 0644 packaging/kubelet.conf.d/90-naru.conf $(DESTDIR)$(PREFIX)/share/naru/kubelet.conf.d/90-naru.conf
	install -d -m 0755 $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	$(bin)/naru completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/naru
	@echo "installed; next: systemctl daemon-reload && systemctl enable --now naru"

.PHONY: uninstall
uninstall: ## Remove what install put there; configuration and /var/lib/naru stay
	rm -f $(DESTDIR)$(PREFIX)/bin/naru $(DESTDIR)$(PREFIX)/bin/naru-monitor
	rm -f $(DESTDIR)$(UNITDIR)/naru.service $(DESTDIR)$(UNITDIR)/naru-monitor.service
	rm -f $(DESTDIR)$(SYSCONFDIR)/apparmor.d/naru-default
	rm -f $(DESTDIR)$(PREFIX)/share/bash-completion/completions/naru
	rm -rf $(DESTDIR)$(PREFIX)/share/naru
	@echo "removed; kept: $(DESTDIR)$(SYSCONFDIR)/naru, $(DESTDIR)$(SYSCONFDIR)/crictl.yaml, /var/lib/naru"

.PHONY: clean
clean: ## Remove bin/ (the caches in $(CACHE) stay)
	rm -rf $(bin)

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {sub(/\$$\(CACHE\)/, "$(CACHE)", $$2); printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Tools. Their versions are pinned in tools/*/go.mod.

.PHONY: hack-tools
hack-tools: check-go
	@mkdir -p $(bin)
	@cd hack && $(call tool,building testimages) -o $(bin)/testimages ./testimages
	@cd hack && $(call tool,building cribench) -o $(bin)/cribench ./bench
	@cd hack && $(call tool,building junitcheck) -o $(bin)/junitcheck ./junitcheck
	@cd hack && CGO_ENABLED=0 $(call tool,building kubelete2e) -o $(bin)/kubelete2e ./kubelete2e
	@cd hack && $(call tool,building clustere2e) -o $(bin)/clustere2e ./clustere2e
	@cd hack && $(call tool,building crimodel) -o $(bin)/crimodel ./model

.PHONY: demo-tools
demo-tools: check-go $(bin)/crictl
	@cd hack && $(call tool,building testimages) -o $(bin)/testimages ./testimages

.PHONY: cri-tools
cri-tools: check-go $(bin)/crictl $(bin)/critest $(bin)/ginkgo

$(bin)/crictl: tools/cri/go.mod tools/cri/go.sum
	@mkdir -p $(bin)
	@cd tools/cri && $(call tool,building crictl) -ldflags '-X sigs.k8s.io/cri-tools/pkg/version.Version=$(call version_in,tools/cri,sigs.k8s.io/cri-tools)' -o $@ sigs.k8s.io/cri-tools/cmd/crictl

$(bin)/critest: tools/cri/go.mod tools/cri/go.sum
	@mkdir -p $(bin)
	@cd tools/cri && $(CURDIR)/hack/gobuild.sh "building critest" $(GO) test -c -trimpath -ldflags '-X sigs.k8s.io/cri-tools/pkg/version.Version=$(call version_in,tools/cri,sigs.k8s.io/cri-tools)' -o $@ sigs.k8s.io/cri-tools/cmd/critest

$(bin)/ginkgo: tools/cri/go.mod tools/cri/go.sum
	@mkdir -p $(bin)
	@cd tools/cri && $(call tool,building ginkgo) -o $@ github.com/onsi/ginkgo/v2/ginkgo

$(bin)/golangci-lint: tools/lint/go.mod tools/lint/go.sum
	@mkdir -p $(bin)
	@cd tools/lint && $(call tool,building golangci-lint (once, about two minutes)) -ldflags '-X main.version=$(call version_in,tools/lint,github.com/golangci/golangci-lint/v2)' -o $@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

version_in = $(shell awk '$$1 == "$(2)" || $$2 == "$(2)" {for (i = 1; i < NF; i++) if ($$i == "$(2)") {print $$(i+1); exit}}' $(1)/go.mod)

# Kubernetes' programs and etcd are big and rarely change: they are kept in the cache,
# in folders named by their version and what go.sum pins, for every clone here.
pins = $(shell sha256sum <$(1)/go.sum | cut -c1-8)
k8s_version  := $(call version_in,tools/kubelet,k8s.io/kubernetes)
k8s_programs := kubelet kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubectl
k8s_ldflags   = -s -w $(foreach v,gitVersion=$(k8s_version) gitMajor=1 gitMinor=$(word 2,$(subst ., ,$(k8s_version))) gitTreeState=clean,-X k8s.io/component-base/version.$(v))
etcd_version := $(call version_in,tools/etcd,go.etcd.io/etcd/server/v3)

.PHONY: k8s-tools
k8s-tools: check-go $(k8s_programs) etcd ## Build a Kubernetes cluster's programs into the cache, once: about twenty minutes on two cores

# kept: folder of go.mod, name, version, flags of the linker, package.
define kept
.PHONY: $(2)
$(2): check-go $(CACHE)/$(2)-$(3)-$(call pins,$(1))/$(2)
	@mkdir -p $(bin) && ln -sfn $(CACHE)/$(2)-$(3)-$(call pins,$(1))/$(2) $(bin)/$(2)

$(CACHE)/$(2)-$(3)-$(call pins,$(1))/$(2):
	@mkdir -p $$(@D)
	@cd $(1) && CGO_ENABLED=0 $$(call tool,building $(2) $(3) (once)) -ldflags '$(4)' -o $$@ $(5)
endef
$(foreach p,$(k8s_programs),$(eval $(call kept,tools/kubelet,$(p),$(k8s_version),$(k8s_ldflags),k8s.io/kubernetes/cmd/$(p))))
$(eval $(call kept,tools/etcd,etcd,$(etcd_version),-s -w,go.etcd.io/etcd/server/v3))

# Checks. One sentence each.

.PHONY: check-go
check-go:
	@have=$$( ($(GO) version 2>/dev/null || true) | awk '{print substr($$3, 3)}'); \
	if [ -z "$$have" ]; then echo "naru needs Go $(needed_go) or newer, and there is no go command here: see https://go.dev/dl" >&2; exit 1; fi; \
	if [ "$$(printf '%s\n' $(needed_go) "$$have" | sort -V | head -1)" != $(needed_go) ]; then \
		echo "naru needs Go $(needed_go) or newer, and this is $$have (Debian's own is too old): see https://go.dev/dl" >&2; exit 1; fi

.PHONY: check-root
check-root:
	@[ "$$(id -u)" = 0 ] || { echo "this target needs root: it makes namespaces, mounts and cgroups (its own only)" >&2; exit 1; }

.PHONY: check-demo
check-demo:
	@hack/check-tools.sh demo

.PHONY: check-test
check-test:
	@hack/check-tools.sh test
