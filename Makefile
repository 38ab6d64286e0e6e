# `make demo` runs the main job, `make test` the tests; both prepare a fresh Debian 12 by themselves (as root).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PY := .venv/bin/python
PACKAGES := python3-bpfcc linux-headers-amd64 python3-venv python3-pip iproute2 nftables tcpdump gcc libc6-dev \
            make openssl nginx-light wrk iperf3 procps util-linux
# What only tests use: software of others that must run through the mesh unchanged, and an emulator for other kernels.
TEST_PACKAGES := haproxy redis-server redis-tools postgresql postgresql-client golang-go curl qemu-system-x86 cpio \
	busybox-static bpftool

.PHONY: help setup demo test lint format proto clean
help:
	@echo "make demo    two nodes, a shop, enrolment, mTLS, policy: the whole mesh on this machine"
	echo "make test    every test; some of them: make test ARGS=\"tests/model -x\""
	echo "make lint    ruff, mypy --strict, import contracts"

setup: build/packages .venv/ready build/ambient-cni  ## everything the other targets need

# Installs what is missing of $(1). kubectl comes from Debian unless one is there already.
# Programs are used, never their daemons: no service may start.
define install
@mkdir -p build
missing=()
for p in $(1); do dpkg-query -W -f='$${Status}' "$$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$$p"); done
command -v kubectl >/dev/null || missing+=(kubernetes-client)
if [ $${#missing[@]} -gt 0 ]; then
  [ "$$(id -u)" = 0 ] || { echo "make: install these packages as root: $${missing[*]}" >&2; exit 1; }
  echo "installing $${missing[*]}"
  apt-get update -qq
  printf '#!/bin/sh\nexit 101\n' > build/policy-rc.d && chmod +x build/policy-rc.d
  [ -e /usr/sbin/policy-rc.d ] || { cp build/policy-rc.d /usr/sbin/policy-rc.d; trap 'rm -f /usr/sbin/policy-rc.d' EXIT; }
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}" >build/apt.log 2>&1 \
    || { tail -20 build/apt.log >&2; exit 1; }
fi
touch $@
endef

build/packages: Makefile
	$(call install,$(PACKAGES))

build/test-packages: Makefile build/packages
	$(call install,$(TEST_PACKAGES))

# Debian's own kernel, for a virtual machine: downloaded and unpacked here, never installed.
build/guest/version: tests/guest/fetch_kernel.sh build/test-packages
	@tests/guest/fetch_kernel.sh $(@D)

# bcc is a distribution package, so the environment sees the system's; the lock file wins over everything else there.
.venv/ready: requirements.lock pyproject.toml build/packages
	@[ -x $(PY) ] || /usr/bin/python3 -m venv --system-site-packages .venv
	echo "installing Python packages"
	.venv/bin/pip install -q --disable-pip-version-check --no-deps --ignore-installed -r requirements.lock
	.venv/bin/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e . 2>build/pip.log \
	  || { cat build/pip.log >&2; exit 1; }
	touch $@

build/ambient-cni: ambient/node/cni_stub.c build/packages
	@mkdir -p build
	gcc -O2 -static -Wall -Wextra -Werror -o $@ $<

demo: setup
	@$(PY) -m ambient demo

# Without ARGS pytest takes the directory pyproject.toml names: with it here, ARGS could only add tests.
test: setup build/test-packages build/guest/version
	@$(PY) -m pytest $(ARGS)

lint: setup
	@.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/mypy --config-file tests/mypy.ini tests
	.venv/bin/lint-imports

format: setup
	@.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

proto: setup
	@$(PY) -m grpc_tools.protoc -I. --python_out=. --pyi_out=. ambient/proto/*.proto

clean:
	@rm -rf build .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
