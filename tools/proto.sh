#!/usr/bin/env bash
# Generates the Python modules and their types from storaged/rpc/proto/*.proto.
#   tools/proto.sh           writes them beside the .proto files
#   tools/proto.sh --check   fails when what is there is not what would be written
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$PWD/.venv/bin/python
dir=storaged/rpc/proto
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT

# From the root, so that the modules import each other as storaged.rpc.proto.*.
PATH=$PWD/.venv/bin:$PATH "$python" -m grpc_tools.protoc -I . \
    --python_out="$fresh" --grpc_python_out="$fresh" \
    --mypy_out=quiet:"$fresh" --mypy_grpc_out=quiet:"$fresh" "$dir"/*.proto

# A file without a service gets an empty gRPC module: leave it out.
for module in "$fresh/$dir"/*_pb2_grpc.py; do
    if ! grep -q '^class ' "$module"; then rm -f "$module" "${module}i"; fi
done

if [[ ${1:-} == --check ]]; then
    if ! diff -r -u --exclude='*.proto' --exclude='__pycache__' --exclude='__init__.py' "$dir" "$fresh/$dir"; then
        echo "proto: the generated files are not those of the .proto files; run \`make proto\`" >&2
        exit 1
    fi
    echo "proto: $(ls "$dir"/*.proto | wc -l) files, generated code up to date"
else
    rm -f "$dir"/*_pb2*.py "$dir"/*_pb2*.pyi
    cp "$fresh/$dir"/* "$dir/"
    echo "proto: generated $(ls "$fresh/$dir" | wc -l) files from $(ls "$dir"/*.proto | wc -l)"
fi
