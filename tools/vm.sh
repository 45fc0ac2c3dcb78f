#!/usr/bin/env bash
# Gets what the tests in a virtual machine need, from Debian, into build/vm; does nothing when it is there.
#   kernel   a stock kernel with its modules, unpacked
#   vsock    vhost-device-vsock, unpacked: a vsock device that needs nothing of this machine's kernel
#   debs     the packages of the guest's system
# Only QEMU is installed (as root), unless it is there. Exit code 1 when any of it cannot be had; the tests skip then.
#   tools/vm.sh --why   the same; says in one line why no virtual machine can run here, and nothing when one can
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${1:-} == --why ]]; then
    mkdir -p build
    if tools/vm.sh >build/vm.log 2>&1; then
        .venv/bin/python -m lab.vm.parts
    else
        why=$(grep . build/vm.log | tail -n 1 || true)
        echo "${why:-tools/vm.sh failed}"
    fi
    exit
fi

kernel=linux-image-amd64
newest=forky # the first release with vhost-device-vsock
guest=(python3 libstdc++6 libc-bin dash findutils btrfs-progs dmsetup kmod iproute2 mount util-linux coreutils e2fsprogs bash grep
    sed mawk tzdata libbtrfsutil1 busybox-static systemd systemd-sysv dbus udev passwd base-passwd)

vm=$PWD/build/vm
mkdir -p "$vm"
exec 9>"$vm/lock"
flock 9
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "vm: no apt here" >&2
    exit 1
fi
apt=(-qq -o APT::Sandbox::User=root -o Acquire::Languages=none)
wanted=$(printf '%s\n' "$kernel" "$newest" "${guest[@]}" | sha256sum)
if [[ -f $vm/got && $(<"$vm/got") == "$wanted" ]] && command -v qemu-system-x86_64 >/dev/null; then exit 0; fi
rm -rf "$vm/got" "$vm/kernel" "$vm/vsock" "$vm/debs"
mkdir -p "$vm/debs/partial" "$vm/apt/lists/partial" "$vm/apt/cache/archives/partial"

if ! command -v qemu-system-x86_64 >/dev/null; then
    if ((EUID != 0)); then
        echo "vm: no qemu-system-x86_64, and not root to install it" >&2
        exit 1
    fi
    DEBIAN_FRONTEND=noninteractive apt-get "${apt[@]}" install -y --no-install-recommends qemu-system-x86
fi

# unpack DIR PACKAGE [APT OPTIONS...]
unpack() {
    local directory=$1 package=$2 work
    shift 2
    work=$(mktemp -d "$vm/work.XXXXXX")
    (cd "$work" && apt-get "${apt[@]}" "$@" download "$package")
    dpkg-deb -x "$work"/*.deb "$directory"
    rm -rf "$work"
}

# The whole of the guest's system, as if nothing were installed here.
: >"$vm/apt/nothing"
apt-get "${apt[@]}" -y -o Dir::State::status="$vm/apt/nothing" -o Dir::Cache::archives="$vm/debs" \
    --download-only --no-install-recommends install "${guest[@]}"
rm -rf "$vm/debs/partial" "$vm/debs/lock"

image=$(apt-cache depends "$kernel" | awk '/Depends: linux-image-/ { print $2; exit }')
unpack "$vm/kernel" "$image"

own=(-o Dir::Etc::sourcelist="$vm/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::State::lists="$vm/apt/lists" -o Dir::Cache="$vm/apt/cache" -o Acquire::Check-Valid-Until=false)
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' 'Label: Debian' | head -n 1)
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $newest main" >"$vm/apt/sources.list"
apt-get "${apt[@]}" "${own[@]}" update
unpack "$vm/vsock" vhost-device-vsock "${own[@]}"
rm -rf "$vm/apt"
printf '%s' "$wanted" >"$vm/got"
