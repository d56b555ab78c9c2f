#!/usr/bin/env bash
# End the S3 server that scripts/s3/start.sh started in DIRECTORY, and nothing else.
# Usage: scripts/s3/stop.sh DIRECTORY
set -uo pipefail
directory=$(cd "${1:?usage: scripts/s3/stop.sh DIRECTORY}" && pwd) || exit 1

# A pid file can outlive its process and the number be given to a stranger: ours name the directory in their command.
ours() { [ -r "/proc/$1/cmdline" ] && tr '\0' '\n' <"/proc/$1/cmdline" | grep -qxF -e "$directory/ceph.conf" -e "$directory"; }

# The watcher first: it would call this script. It may be the very process that runs it.
files=("$directory"/watch.pid "$directory"/client.rgw.pid "$directory"/osd.0.pid "$directory"/mon.a.pid)
pids=()
for file in "${files[@]}"; do
  [ -r "$file" ] || continue
  read -r pid <"$file" || continue
  if [ "$pid" != $$ ] && ours "$pid"; then
    # The daemons hold nothing that must last; a polite end of the object daemon takes seconds.
    kill -KILL "$pid" 2>/dev/null && pids+=("$pid")
  fi
done
for pid in "${pids[@]}"; do
  for _ in $(seq 100); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
done
exit 0
