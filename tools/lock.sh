#!/usr/bin/env bash
# Pins every dependency of pyproject.toml, with hashes, into requirements*.txt.
#   tools/lock.sh             keep the pins that still fit
#   tools/lock.sh --upgrade   take the newest versions that pyproject.toml allows
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv=$(command -v uv || true)
if [[ -z $uv ]]; then
    uv=build/lock/bin/uv
    if [[ ! -x $uv ]]; then
        mkdir -p build
        "${PYTHON:-.venv/bin/python}" -m venv build/lock
        build/lock/bin/pip install --quiet --disable-pip-version-check 'uv>=0.13'
    fi
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# compile OUT WHAT ARGS...: the file's own pins are the preferred ones, unless --upgrade is given.
compile() {
    local out=$1 what=$2
    shift 2
    if [[ -f $out ]]; then cp "$out" "$work/$out"; fi
    "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-emit-find-links --no-header --output-file "$work/$out" "$@"
    {
        echo "# $what"
        echo "# Made by \`make lock\` from pyproject.toml; do not edit."
        sed -e '/^#/d' -e "s|$work/||" "$work/$out"
    } >"$work/$out.new"
}

compile requirements.txt "What storaged needs to run." pyproject.toml "$@"
compile requirements-dev.txt "What storaged needs to run, to be tested and to be built." \
    pyproject.toml --extra dev --constraint "$work/requirements.txt" "$@"
sed -n '/^setuptools==/,/^[^ ]/{/^setuptools==/p;/^ *--hash/p}' "$work/requirements-dev.txt" >"$work/setuptools.txt"
{
    echo "# What builds the packages that come as source; install this first."
    echo "# Made by \`make lock\` from requirements-dev.txt; do not edit."
    cat "$work/setuptools.txt"
} >"$work/requirements-build.txt.new"

for f in requirements.txt requirements-dev.txt requirements-build.txt; do
    cp "$work/$f.new" "$f"
done
if grep -nE '://|--(extra-)?index-url|--find-links|[ "]/' requirements*.txt; then
    echo "lock: the lines above name a package host or a path" >&2
    exit 1
fi
echo "lock: $(grep -cE '^[a-z]' requirements.txt) packages to run, $(grep -cE '^[a-z]' requirements-dev.txt) to develop"
