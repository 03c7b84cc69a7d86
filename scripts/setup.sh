#!/bin/sh
# Build .venv with everything that the make targets need, or return at once if it is current.
#
#   PYTHON=/path/to/python   the interpreter to build it with (default: the newest found)
#   TORCH=cpu                the CPU build of torch, which is smaller (default: PyPI's)
set -eu
cd "$(dirname "$0")/.."
stamp=.venv/.fieldmark-ready # written last, so that an interrupted set-up is taken up again

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3.13 python3.12 python3.11 python3; fi
    too_old='' no_venv=''
    for python; do
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
            continue
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            too_old="$python is Python $version, and 3.11 or later is needed: install one, or name it with PYTHON=/path/to/python."
        elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
            no_venv="$python has no venv module: install it (Debian, Ubuntu: apt-get install python$version-venv)."
        else
            echo "$python"
            return
        fi
    done
    fail "${no_venv:-${too_old:-No Python was found as $*: install Python 3.11 or later, or name it with PYTHON=/path/to/python.}}"
}

# Of two set-ups at once the second waits, and then finds the stamp.
exec 9<pyproject.toml
if command -v flock >/dev/null; then
    flock -n 9 || { say "waiting for another set-up of this folder"; flock 9; }
fi

# Without TORCH, the build that is there stays; with it, another build is replaced.
installed=$(cat .venv/.fieldmark-torch 2>/dev/null || true)
torch=${TORCH:-${installed:-default}}
case $torch in cpu | default) ;; *) fail "TORCH must be 'cpu' or 'default'. Got '$torch'." ;; esac
want="$torch $(cat pyproject.toml constraints.txt | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then exit 0; fi

if [ -d .venv ]; then
    rm -f "$stamp"
    if [ "$torch" != "${installed:-$torch}" ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        say "removing .venv, which is half-built or holds the other build of torch"
        rm -rf .venv
    fi
fi

# Installed files and, for the time of the download, wheels: 7 + 3 GB with CUDA, 2 + 1 GB without.
if [ "$torch" = cpu ]; then need_gb=3 hint=''; else need_gb=10 hint=', or set TORCH=cpu, which needs 3'; fi
free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
used_kb=$(if [ -d .venv ]; then du -sk .venv; else echo 0; fi | awk '{ print $1 }')
if [ $((free_kb + used_kb)) -lt $((need_gb * 1000000)) ]; then
    fail "About $need_gb GB of free disk are needed in $PWD, which has $((free_kb / 1000000)): free some$hint."
fi

if [ ! -d .venv ]; then
    python=$(find_python)
    say "building .venv with $("$python" --version), which takes some minutes"
    "$python" -m venv .venv
fi
echo "$torch" >.venv/.fieldmark-torch
if [ "$torch" = cpu ]; then
    # Nothing else from that index: the next command takes the dependencies from PyPI.
    .venv/bin/python -m pip install --no-deps -c constraints.txt \
        --index-url https://download.pytorch.org/whl/cpu torch torchvision
fi
.venv/bin/python -m pip install -c constraints.txt -e '.[dev]'
echo "$want" >"$stamp"
