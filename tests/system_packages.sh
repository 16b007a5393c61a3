#!/usr/bin/env bash
# Installs what the tests marked `system` need and this machine lacks: `make test-system` runs it first.
# Where nothing can be installed, it says so; the tests that need it are skipped then.
set -euo pipefail

declare -A package_of=([ip]=iproute2 [unshare]=util-linux [nsenter]=util-linux [redis-server]=redis-server)
missing=()
for tool in "${!package_of[@]}"; do
    command -v "$tool" >/dev/null || missing+=("${package_of[$tool]}")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "== ${missing[*]}: missing, and only root can install it, with apt-get; tests that need it are skipped"
    exit 0
fi
echo "== installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# RUNLEVEL: Debian starts no server on installation there.
apt-get update -qq || true
RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
    echo "== ${missing[*]}: can't be installed here; tests that need it are skipped"
