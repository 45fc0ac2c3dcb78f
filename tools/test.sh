#!/usr/bin/env bash
# Runs the tests: first those that may run side by side, then, one at a time, those that need a real btrfs, and last
# a selection of those in a virtual machine (LONG=1: all of them but the two hundred power cuts).
#   tools/test.sh [PYTEST ARGS...]
# JOBS=N processes for the first part. LONG=1 runs the slow ones too.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

and_not_slow=" and not slow"
if [[ -n ${LONG:-} ]]; then and_not_slow=; fi
failed=0

# part NAME MARKERS ARGS...: every part runs, whatever the ones before it said.
part() {
    local name=$1 markers=$2 status=0
    shift 2
    echo "test: $name"
    .venv/bin/python -m pytest -q -m "$markers" "$@" || status=$?
    if ((status == 1)); then
        # Where something may be lost one failure is one too many. No test is chosen: 5.
        local again=(.venv/bin/python -m pytest -q "$@" -n 0 --last-failed --last-failed-no-failures none)
        if "${again[@]}" -m "($markers) and once" --collect-only >/dev/null; then
            echo "test: $name: tests marked \`once\` failed, which counts at once"
            failed=1
        fi
        # The others share two cores with the kernel's own threads: what failed gets one more try, by itself.
        echo "test: $name: once more what else failed; a second failure counts"
        status=0
        "${again[@]}" -m "($markers) and not once" || status=$?
    fi
    if ((status == 5)); then
        echo "test: no such test here"
    elif ((status)); then
        failed=1
    fi
    if ((status == 2)); then exit 2; fi # interrupted
}

why=$(tools/vm.sh --why) # first: it brings QEMU, which tests of the host want too
part "without a real filesystem" "not btrfs and not vm$and_not_slow" -n "${JOBS:-2}" "$@"
part "on btrfs, one at a time" "btrfs and not vm$and_not_slow" ${LONG:+-rP} "$@"
if [[ -n $why ]]; then
    echo "test: in a virtual machine: left out: $why"
else
    and_not_more=" and not vm_more" cuts=4
    if [[ -n ${LONG:-} ]]; then and_not_more='' cuts=20; fi
    export VM_CUTS=${VM_CUTS:-$cuts}
    part "in a virtual machine" "vm and not slow$and_not_more" ${LONG:+-rP} "$@"
fi
if [[ -z ${LONG:-} ]]; then echo "test: left out the slow tests; \`make test-long\` runs them"; fi
exit "$failed"
