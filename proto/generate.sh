#!/bin/sh
# Regenerates the Python stubs beside the .proto files. Run it after each change of a .proto file.
#
# The compiler's version is pinned on purpose: generated code demands a runtime at least as new as
# its compiler, and 1.72.1 is the oldest that emits protobuf 6 code, which runs on protobuf 6 and 7.
set -eu
GRPCIO_TOOLS=1.72.1

root=$(cd "$(dirname "$0")/.." && pwd)
venv="$root/build/protoc-$GRPCIO_TOOLS"
if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet "grpcio-tools==$GRPCIO_TOOLS" setuptools
fi
"$venv/bin/python" -m grpc_tools.protoc --proto_path="$root/proto" \
    --python_out="$root/proto" --pyi_out="$root/proto" --grpc_python_out="$root/proto" \
    "$root"/proto/millrace/v1/*.proto
