#!/usr/bin/env bash
# Start an S3 server of our own on loopback: one Ceph monitor, one object daemon, one gateway, all under DIRECTORY.
# Usage: scripts/s3/start.sh DIRECTORY [PID]
#   DIRECTORY  new or empty; holds configuration, logs and pid files. scripts/s3/stop.sh DIRECTORY ends the server.
#   PID        the server ends when this process does, however that dies.
# S3_BACKING=bluestore keeps the objects in a file under DIRECTORY; by default they are in memory.
# Prints, and writes to DIRECTORY/server.env, the variables that S3 clients take: set -a; . DIRECTORY/server.env
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
directory=${1:?usage: scripts/s3/start.sh DIRECTORY [PID]}
watched=${2:-}
mkdir -p "$directory"
directory=$(cd "$directory" && pwd)
if [ -e "$directory/ceph.conf" ]; then
  echo "start.sh: $directory has held a server before; give it a new directory" >&2
  exit 1
fi
mkdir "$directory"/{mon,osd,rgw,log}

# Ports that nobody listens on, so that several servers live side by side. They lie below the range from which the
# kernel gives ports to outgoing connections: one of those could otherwise take a port before its daemon does.
read -r port mon_port < <(python3 - <<'PYTHON'
import random, socket

held = []
while len(held) < 2:
    candidate = socket.socket()
    try:
        candidate.bind(("127.0.0.1", random.randrange(20000, 32000)))
    except OSError:
        continue
    held.append(candidate)
print(*(one.getsockname()[1] for one in held))
PYTHON
)

random_word() { tr -d - </proc/sys/kernel/random/uuid; }
access_key=TEST$(random_word | cut -c-16 | tr a-f A-F)
secret_key=$(random_word)
cluster=$(cat /proc/sys/kernel/random/uuid)
cat >"$directory/ceph.conf" <<CONF
[global]
fsid = $cluster
mon_host = v2:127.0.0.1:$mon_port
ms_bind_ipv6 = false
ms_bind_msgr1 = false
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
# Real authentication between the daemons: without it the gateway never came up.
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
keyring = $directory/keyring
mon_data = $directory/mon
osd_data = $directory/osd
log_file = $directory/log/\$name.log
# A socket's path is at most 107 bytes long, which a test's directory may exceed; nobody asks the daemons anyway.
admin_socket =
run_dir = $directory
pid_file = $directory/\$name.pid
# One copy of everything, in few placement groups: a cluster of one daemon is healthy, and starts in a second.
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_num_min = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_warn_on_pool_no_redundancy = false
# A monitor without peers has nobody to wait for.
paxos_propose_interval = 0.02
paxos_min_wait = 0.005
# A nearly full disk must not stop a server that writes a few megabytes.
mon_data_avail_warn = 3
mon_data_avail_crit = 2
# A machine busy with tests must not have its only object daemon declared dead.
osd_heartbeat_grace = 120
osd_max_markdown_count = 100
osd_objectstore = ${S3_BACKING:-memstore}
memstore_device_bytes = 8589934592
bluestore_block_size = 34359738368
bluestore_fsck_on_mount = false
osd_memory_target = 1073741824
[client.rgw]
# Without tcp_nodelay small answers wait for the client to acknowledge the one before.
rgw_frontends = beast endpoint=127.0.0.1:$port tcp_nodelay=1 max_connection_backlog=512
rgw_dns_name = 127.0.0.1
rgw_thread_pool_size = 64
rgw_data = $directory/rgw
CONF

# Whatever fails from here on leaves no daemon behind.
give_up() {
  echo "start.sh: no S3 server; the logs are in $directory/log" >&2
  "$here/stop.sh" "$directory"
  exit 1
}

ceph=(-c "$directory/ceph.conf")
key() { ceph-authtool "$1" --gen-key -n "${@:2}" >/dev/null; }
(
  umask 077
  ceph-authtool --create-keyring "$directory/keyring" >/dev/null
  key "$directory/keyring" mon. --cap mon 'allow *'
  key "$directory/keyring" client.admin --cap mon 'allow *' --cap osd 'allow *'
  key "$directory/keyring" client.rgw --cap mon 'allow rw' --cap osd 'allow rwx'
  key "$directory/keyring" osd.0 --cap mon 'allow *' --cap osd 'allow *'
)
# In a process of its own: under `||` alone, bash would go on after a command that failed.
(
  monmaptool --create --fsid "$cluster" --addv a "[v2:127.0.0.1:$mon_port]" "$directory/monmap"
  ceph-mon "${ceph[@]}" --mkfs -i a --monmap "$directory/monmap" --keyring "$directory/keyring"
  ceph-mon "${ceph[@]}" -i a
  disk=$(cat /proc/sys/kernel/random/uuid)
  ceph "${ceph[@]}" osd new "$disk"
  ceph-osd "${ceph[@]}" -i 0 --mkfs --osd-uuid "$disk"
  ceph-osd "${ceph[@]}" -i 0
  radosgw "${ceph[@]}" -n client.rgw
  # The first request to the gateway makes its pools; this one also waits until it can.
  radosgw-admin "${ceph[@]}" -n client.rgw user create --uid=tester --display-name=tester \
    --access-key="$access_key" --secret-key="$secret_key"
) >"$directory/log/start.log" 2>&1 </dev/null &
wait $! || give_up

answers() { (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; }
for _ in $(seq 600); do
  answers && break
  sleep 0.1
done
answers || give_up

if [ -n "$watched" ]; then
  # A process of its own session, so that whatever kills the watched one's group does not reach it.
  setsid bash -c 'while kill -0 "$1" 2>/dev/null; do sleep 1; done; exec "$2" "$3"' \
    s3-watch "$watched" "$here/stop.sh" "$directory" </dev/null >/dev/null 2>&1 &
  echo $! >"$directory/watch.pid"
fi

(
  umask 077
  cat >"$directory/server.env" <<ENV
AWS_ENDPOINT_URL=http://127.0.0.1:$port
AWS_ACCESS_KEY_ID=$access_key
AWS_SECRET_ACCESS_KEY=$secret_key
AWS_REGION=us-east-1
AWS_DEFAULT_REGION=us-east-1
CEPH_CONF=$directory/ceph.conf
ENV
)
cat "$directory/server.env"
