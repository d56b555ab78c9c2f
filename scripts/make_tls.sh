#!/usr/bin/env bash
# Make what a service off loopback needs, in OUT: tls.crt and tls.key (a self-signed certificate), token (of the
# service; a line `TOKEN PRINCIPAL ROLE` per caller narrows it) and ray_token (of the Ray beneath it).
# Usage: scripts/make_tls.sh OUT [NAME-OR-ADDRESS ...]. Clients trust tls.crt and send the token.
# For a company's network, put a certificate of its own authority there instead.
set -euo pipefail

out=${1:?usage: scripts/make_tls.sh OUT [NAME-OR-ADDRESS ...]}
shift
names="DNS:membank,DNS:localhost,IP:127.0.0.1"
for name in "$@"; do
  if [[ $name =~ ^[0-9.]+$|: ]]; then names+=",IP:$name"; else names+=",DNS:$name"; fi
done

# Never over an existing key: clients out there trust it.
for file in tls.crt tls.key token ray_token; do
  if [ -e "$out/$file" ]; then
    echo "make_tls: $out/$file exists; remove it first to replace it" >&2
    exit 1
  fi
done

mkdir -p "$out"
umask 077
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -days 365 \
  -subj "/CN=membank" -addext "subjectAltName=$names" \
  -keyout "$out/tls.key" -out "$out/tls.crt" 2>/dev/null
openssl rand -hex 32 > "$out/token"
# Ray compares the file as it is, a line end included.
openssl rand -hex 32 | tr -d '\n' > "$out/ray_token"
chmod 644 "$out/tls.crt"
echo "make_tls: wrote tls.crt, tls.key, token and ray_token into $out, for $names"
