#!/bin/sh
# Install what the tests of clients need, in other languages and of others, into .clients, or return at once if it
# is there. Each client has a folder tests/clients/NAME with its pinned requirements, and a function
# of its name below. A language that this machine lacks is left out, and its tests skip.
set -eu
cd "$(dirname "$0")/.."

say() { echo "clients: $*" >&2; }
fail() { say "$*"; exit 1; }

# Of two at once the second waits, and then finds the stamps.
exec 9<scripts/clients.sh
if command -v flock >/dev/null; then
    flock -n 9 || { say "waiting for another installation in this folder"; flock 9; }
fi

# install NAME COMMAND ARGUMENT...: run the command in .clients/NAME, beside the files of
# tests/clients/NAME, unless it was run there with these very files before.
install() {
    name=$1 stamp=.clients/$1/.ready # written last, so that an interrupted one is begun again
    shift
    want="$* $(cat "tests/clients/$name"/* | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then return; fi
    say "installing .clients/$name"
    rm -rf ".clients/$name"
    mkdir -p ".clients/$name"
    cp "tests/clients/$name"/* ".clients/$name"
    (cd ".clients/$name" && "$@") || fail "$1 must install tests/clients/$name. It failed, as said above. Run make clients again."
    echo "$want" >"$stamp"
}

javascript() {
    if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
        say "leaving out JavaScript: node and npm must both be here. Install Node 20 or later."
    elif ! node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)'; then
        say "leaving out JavaScript: node must be 20 or later. Got $(node --version)."
    else
        install javascript npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
    fi
}

# An environment of its own: what a client brings must not be what the service needs.
python() {
    base=$PWD/.venv/bin/python
    [ -x "$base" ] || base=python3
    install python sh -c '"$1" -m venv . && bin/pip install --quiet --disable-pip-version-check -r requirements.txt' venv "$base"
}

javascript
python
