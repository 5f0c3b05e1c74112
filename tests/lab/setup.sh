#!/bin/bash
# Everything tests, benchmarks and the demo need, on Debian 12 or 13: packages of the distribution, and .venv with
# the project and its tools. Does nothing when all of it is there. What else they need (kernel, root folders) they
# fetch themselves, into the cache described in cache.py.
set -euo pipefail
cd "$(dirname "$0")/../.."

packages=(
    qemu-system-x86 qemu-utils iproute2 socat systemd  # what is run
    openssh-client                                     # a client of the server guest
    libnbd-bin                                         # other clients for our NBD server
    debootstrap patchelf cpio zstd ca-certificates     # for other QEMU versions, and for the guests
    gcc libc6-dev binutils make e2fsprogs              # for the guests' programs
    libcap-dev python3-dev python3-venv                # python-prctl is compiled
)

missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) || state=absent
    [[ $state == installed ]] || missing+=("$package")
done

if ((${#missing[@]})); then
    if ! command -v apt-get >/dev/null; then
        echo "This needs Debian 12 or 13; elsewhere, install what these packages hold: ${missing[*]}" >&2
        exit 1
    fi
    if ((EUID != 0)); then
        echo "Some packages are missing. As root:" >&2
        echo "    apt-get update && apt-get install --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update
    apt-get -q -y install --no-install-recommends "${missing[@]}"
fi

# The distribution's own Python: the one the packages above belong to.
python=/usr/bin/python3
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$("$python" -V) is too old: Curling needs 3.11 (Debian 12) or later" >&2
    exit 1
fi

# What .venv was made from is written down in it, last.
stamp=.venv/made-from
wanted="$("$python" -V) $PWD $(sha256sum <pyproject.toml)"
if [[ -e $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi
if [[ -e .venv && $(.venv/bin/python -V 2>/dev/null) != $("$python" -V) ]]; then
    rm -rf .venv
fi
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --editable '.[test,lint]'
echo "$wanted" >"$stamp"
