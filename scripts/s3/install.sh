#!/usr/bin/env bash
# Install the S3 server that the tests run against: the Ceph object gateway and what it needs, from Debian.
# Never fails: the last line of output is `s3-server: present`, `s3-server: installed` or `s3-server: absent (WHY)`,
# and the tests skip what needs the server where it is absent.
set -uo pipefail

if command -v radosgw >/dev/null; then
  echo "s3-server: present"
  exit 0
fi
absent() {
  echo "s3-server: absent ($1)"
  exit 0
}
[ "$(id -u)" -eq 0 ] || absent "installing needs root; run 'sudo scripts/s3/install.sh'"
command -v apt-get >/dev/null || absent "no apt-get here; install the Ceph object gateway (radosgw) by hand"

export DEBIAN_FRONTEND=noninteractive
# faketime lets a test run with a wrong clock.
packages=(radosgw ceph-mon ceph-osd ceph-mgr ceph-common faketime)
# The lists may be missing (a container image) or stale, so they are fetched; a failure shows at the next step.
apt-get update -qq >&2 || true
# The packages start nothing by themselves: there is no cluster in /etc/ceph.
apt-get install -y -qq --no-install-recommends "${packages[@]}" >&2 ||
  absent "apt-get could not install ${packages[*]}"
command -v radosgw >/dev/null || absent "the packages brought no radosgw"
echo "s3-server: installed"
