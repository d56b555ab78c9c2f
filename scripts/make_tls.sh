#!/usr/bin/env bash
# Make a self-signed certificate, its key and a token for a service off loopback: OUT/tls.crt, tls.key, token.
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
for file in tls.crt tls.key token; do
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
chmod 644 "$out/tls.crt"
echo "make_tls: wrote $out/tls.crt, tls.key and token for $names"
