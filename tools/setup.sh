#!/usr/bin/env bash
# Makes .venv with everything that storaged, its tests and its tools need.
#   tools/setup.sh [--quiet]   --quiet says nothing when there is nothing to do
# PYTHON=... chooses the interpreter. The full log is in build/setup.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
log=build/setup.log
stamp=$venv/.setup-stamp
inputs=(tools/setup.sh tools/prometheus.sh pyproject.toml requirements-build.txt requirements-dev.txt)

say() { printf 'setup: %s\n' "$*"; }

want=$({ pwd -P; cat "${inputs[@]}"; } | sha256sum)
up_to_date() {
    [[ -f $stamp && $(<"$stamp") == "$want" && -x $venv/bin/python && -x $venv/bin/storaged ]]
}
finish_early() {
    if [[ ${1:-} != --quiet ]]; then say "up to date"; fi
    exit 0
}
if up_to_date; then finish_early "$@"; fi

mkdir -p build
if command -v flock >/dev/null; then
    exec 9>build/setup.lock
    flock 9
    if up_to_date; then finish_early "$@"; fi # another run was faster
fi
: >"$log"

# step TEXT COMMAND...: one line, the command's output in the log, shown when it fails.
step() {
    local text=$1 status=0 began=$SECONDS
    shift
    printf '== %s: %s\n' "$text" "$*" >>"$log"
    "$@" >>"$log" 2>&1 9>&- || status=$?
    if ((status)); then
        say "$text: FAILED"
        return "$status"
    fi
    say "$text ($((SECONDS - began)) s)"
}
show_log() {
    echo "---- the end of $log:" >&2
    tail -n 40 "$log" >&2
}
die() {
    show_log
    say "stopped: $*" >&2
    exit 1
}

# ---- a Python that can make a venv and compile an extension ----------------------------------------------

runs='
import sys
if sys.version_info < (3, 11):
    sys.exit("too old")
import ensurepip, venv
'
fit="$runs"'
import os, sysconfig
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit("no headers")
'
# find_python CHECK: the first interpreter that passes the check.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do
        candidate=$(command -v "$candidate" 2>/dev/null) || continue
        if "$candidate" -c "$1" >>"$log" 2>&1; then
            # The interpreter itself, not a version manager's wrapper or another venv.
            "$candidate" -c 'import os, sys; print(os.path.join(sys.base_prefix, "bin", "python%d.%d" % sys.version_info[:2]))'
            return
        fi
    done
    return 1
}

# ---- system packages ---------------------------------------------------------------------------------------

# qemu-system-common: qemu-storage-daemon, which logs the writes that the power cut tests replay.
packages=(
    gcc libc6-dev libbtrfsutil-dev libudev1 udev btrfs-progs e2fsprogs iproute2 mount util-linux kmod make
    qemu-system-common
)
if ! find_python "$fit" >/dev/null; then packages+=(python3-venv python3-dev); fi

if command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; then
    missing=()
    for package in "${packages[@]}"; do
        state=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
        if [[ $state != installed ]]; then missing+=("$package"); fi
    done
    if ((${#missing[@]} == 0)); then
        :
    elif ((EUID != 0)); then
        say "skipped system packages (not root): ${missing[*]}"
    else
        export DEBIAN_FRONTEND=noninteractive
        # Without fresh lists an installation may still work from the old ones.
        step "fetch package lists" apt-get -q update || true
        step "install ${missing[*]}" apt-get -q install -y --no-install-recommends "${missing[@]}" ||
            say "going on without them; the reason is in $log"
    fi
else
    say "skipped system packages (no apt here); needed: ${packages[*]}"
fi

# ---- the venv ----------------------------------------------------------------------------------------------

compiles=yes
if ! python=$(find_python "$fit"); then
    compiles=
    python=$(find_python "$runs") || die "no Python 3.11 or newer with venv; set PYTHON=..."
fi
have_header() { echo '#include <btrfsutil.h>' | gcc -E -x c -o /dev/null - >>"$log" 2>&1; }
if ! have_header; then compiles=; fi

home=$venv/.made-for
made_for="$(pwd -P) $python $("$python" -V)"
if [[ ! -x $venv/bin/python || ! -f $home || $(<"$home") != "$made_for" ]]; then
    step "make $venv with $("$python" -V)" "$python" -m venv --clear "$venv" || die "no venv"
    printf '%s\n' "$made_for" >"$home"
fi
rm -f "$stamp"

pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install --progress-bar off)
# The packages that come as source are built with the pinned setuptools, not with whatever is newest today.
locked=(--no-build-isolation --require-hashes)
requirements=requirements-dev.txt
if [[ -z $compiles ]]; then
    say "skipped btrfsutil (needs gcc, Python.h and btrfsutil.h): only --sim will work"
    requirements=build/requirements-sim.txt
    awk '/^[^ ]/ { skip = /^btrfsutil==/ } !skip' requirements-dev.txt >"$requirements"
fi
step "install build tools" "${pip[@]}" "${locked[@]}" -r requirements-build.txt || die "pip failed"
step "install $(grep -cE '^[a-z]' "$requirements") pinned packages" \
    "${pip[@]}" "${locked[@]}" -r "$requirements" || die "pip failed"
step "install storaged, editable" "${pip[@]}" --no-deps --no-build-isolation --editable . || die "pip failed"

# Only tests and the demo use it, and both say so when it is not there.
step "unpack prometheus beside" tools/prometheus.sh || say "going on without prometheus; the reason is in $log"
# Only tests use these, likewise.
step "unpack a 9p server and systemd-nspawn beside" tools/beside.sh || say "going on without; the reason is in $log"

printf '%s' "$want" >"$stamp"
say "done: $venv/bin/storaged, $venv/bin/storagectl"
