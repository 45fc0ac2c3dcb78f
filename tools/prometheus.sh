#!/usr/bin/env bash
# Puts Debian's prometheus, promtool and amtool into build/prometheus, unpacked: nothing is installed, no service starts.
#   tools/prometheus.sh   does nothing when they are there, or on PATH; exit code 1 when they cannot be had
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

there() { [[ -x build/prometheus/usr/bin/$1 ]] || command -v "$1" >/dev/null; }

missing=()
if ! there prometheus || ! there promtool; then missing+=(prometheus); fi
if ! there amtool; then missing+=(prometheus-alertmanager); fi
if ((${#missing[@]} == 0)); then exit 0; fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "prometheus: no apt here; install ${missing[*]}" >&2
    exit 1
fi

work=$(mktemp -d build/prometheus.XXXXXX)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
fetch() { (cd "$work" && apt-get -q download "${missing[@]}"); }
if ! fetch; then
    if ((EUID == 0)); then apt-get -q update || true; fi # without fresh lists a download may find nothing
    fetch
fi
for package in "$work"/*.deb; do dpkg-deb -x "$package" "$work/root"; done
mkdir -p build/prometheus/usr/bin
cp "$work"/root/usr/bin/* build/prometheus/usr/bin/
