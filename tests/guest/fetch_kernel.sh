#!/bin/bash
# Fetch Debian's own kernel for the guest of tests/guest: fetch_kernel.sh DIRECTORY
#
# DIRECTORY gets vmlinuz, modules/*.ko (those that init.sh loads and those that are loaded when used) and version.
# The package is only downloaded and unpacked: nothing is installed, nothing runs.
set -euo pipefail

directory=$1

fail() {
  echo "fetch_kernel: $*" >&2
  exit 1
}

# The versioned package that Debian's meta package stands for.
image() { apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -1; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

download() {
  package=$(image)
  [ -n "$package" ] && (cd "$scratch" && apt-get download -qq -o Acquire::Retries=1 -o APT::Sandbox::User=root "$package") 2>"$scratch/said"
}

# A package list that is old names files that are gone.
download || apt-get update -qq 2>"$scratch/said" && { compgen -G "$scratch/*.deb" >/dev/null || download; } ||
  fail "cannot fetch linux-image-amd64 with apt ($(tail -1 "$scratch/said")): is this Debian 12, with a network?"

deb=("$scratch"/*.deb)
dpkg-deb --fsys-tarfile "${deb[0]}" | tar -x -C "$scratch" --wildcards \
  './boot/vmlinuz-*' './lib/modules/*/kernel/drivers/virtio/*' './lib/modules/*/kernel/drivers/net/veth.ko*' \
  './lib/modules/*/kernel/fs/9p/*' './lib/modules/*/kernel/fs/netfs/*' './lib/modules/*/kernel/fs/fscache/*' \
  './lib/modules/*/kernel/fs/overlayfs/*' './lib/modules/*/kernel/net/*'
rm -rf "$directory.new"
mkdir -p "$directory.new/modules"
mv "$scratch"/boot/vmlinuz-* "$directory.new/vmlinuz"
find "$scratch/lib/modules" -name '*.ko*' -exec mv -t "$directory.new/modules" {} +
dpkg-deb -W --showformat='${Package} ${Version}\n' "${deb[0]}" >"$directory.new/version"
rm -rf "$directory"
mv "$directory.new" "$directory"
echo "fetched $(cat "$directory/version")"
