#!/usr/bin/env bash
# Fail if the checked-in generated code differs from what the schema gives, or if buf finds fault with the schema.
# Usage: scripts/check_proto.sh VENV. BUF_VERSION names the release of @bufbuild/buf to run through npx.
set -euo pipefail
cd "$(dirname "$0")/.."

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
scripts/generate_proto.sh "$1" "$fresh"

# Both directions: a schema file that was removed must not leave its generated code behind.
if ! diff -r --exclude='*.proto' --exclude=__init__.py --exclude=py.typed --exclude=__pycache__ \
  "$fresh/membank/v1" proto/membank/v1; then
  echo "proto-check: generated code is stale; run 'make proto' and commit the result" >&2
  exit 1
fi
echo "proto-check: generated code matches the schema"

if ! command -v npx >/dev/null; then
  echo "proto-check: buf lint skipped (npx is not installed)"
elif ! npx --yes "@bufbuild/buf@${BUF_VERSION}" --version >/dev/null 2>&1; then
  echo "proto-check: buf lint skipped (npx could not fetch @bufbuild/buf@${BUF_VERSION})"
else
  npx --yes "@bufbuild/buf@${BUF_VERSION}" lint
  npx --yes "@bufbuild/buf@${BUF_VERSION}" format --diff --exit-code
  echo "proto-check: buf lint and buf format are clean"
fi
