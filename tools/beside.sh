#!/usr/bin/env bash
# Unpacks what some tests use into build/, from Debian's packages. Nothing is installed, nothing starts.
#   build/uml     a kernel that runs as an ordinary program, and a 9p server: where this machine's kernel has no 9p
#   build/nspawn  systemd-nspawn: a container with an init system of its own
# Exit code 1 when any of it cannot be had; the tests skip then, and say so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

failed=0

# unpack DIR PROGRAM PACKAGE...: does nothing when the program is there.
unpack() {
    local directory=build/$1 program=$2 work
    shift 2
    if [[ -x $directory/$program ]]; then return; fi
    work=$(mktemp -d build/beside.XXXXXX)
    chmod 755 "$work"
    if (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$@"); then
        for package in "$work"/*.deb; do dpkg-deb -x "$package" "$work/root"; done
        rm -rf "$directory"
        mv "$work/root" "$directory"
    else
        failed=1
    fi
    rm -rf "$work"
}

if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "no apt here" >&2
    exit 1
fi
unpack uml usr/bin/linux.uml user-mode-linux diod libwrap0 liblua5.1-0 libmunge2
if ! command -v systemd-nspawn >/dev/null; then
    unpack nspawn usr/bin/systemd-nspawn systemd-container
fi
exit "$failed"
