#!/usr/bin/env bash
# Install what membank is compared with and pip cannot bring: Redis and the libraries that Mooncake Store loads, from Debian.
# Never fails: one line for each says `peers: NAME present`, `installed` or `absent (WHY)`, and the benchmark reports
# what is absent as not run.
set -uo pipefail

libraries=(libibverbs1 librdmacm1 libnl-3-200 libnl-route-3-200 libnuma1)

has_redis() { command -v redis-server >/dev/null; }
has_libraries() {
  local name
  for name in libibverbs.so.1 librdmacm.so.1 libnl-3.so.200 libnl-route-3.so.200 libnuma.so.1; do
    /sbin/ldconfig -p 2>/dev/null | grep -q "$name" || return 1
  done
}

updated=
# Usage: install NAME CHECK PACKAGE...
install() {
  local name=$1 check=$2
  shift 2
  if "$check"; then echo "peers: $name present"; return; fi
  if [ "$(id -u)" -ne 0 ]; then
    echo "peers: $name absent (installing needs root; run 'sudo scripts/peers/install.sh')"; return
  fi
  if ! command -v apt-get >/dev/null; then
    echo "peers: $name absent (no apt-get here; install $* by hand)"; return
  fi
  export DEBIAN_FRONTEND=noninteractive
  # The lists may be missing (a container image) or stale; a failure shows at the next step.
  [ -n "$updated" ] || { apt-get update -qq >&2 || true; updated=1; }
  # RUNLEVEL=1 keeps Debian from starting a Redis of the system: the benchmark starts its own.
  if RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "$@" >&2 && "$check"; then
    echo "peers: $name installed"
  else
    echo "peers: $name absent (apt-get could not install $*)"
  fi
}

install redis has_redis redis-server
install mooncake-libraries has_libraries "${libraries[@]}"
