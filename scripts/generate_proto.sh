#!/usr/bin/env bash
# Generate the Python code and stubs of proto/membank/v1 under OUT (default: beside the schema).
# Usage: scripts/generate_proto.sh VENV [OUT], where VENV holds grpcio-tools and mypy-protobuf.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(cd "$1" && pwd)
out=${2:-proto}

# protoc looks its plugins up on PATH.
PATH="$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc \
  -Iproto --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
  proto/membank/v1/*.proto
