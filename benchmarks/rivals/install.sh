#!/bin/sh
# Install the rivals beside, not into, the environment that the service runs in; .venv lends the
# rest. uvloop is what fastapi[standard] brings along.
set -eu
cd "$(dirname "$0")/../.."
.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --target .clients/litserve \
    litserve==0.2.19 pyzmq==27.3.0
.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --target .clients/fastapi \
    uvloop==0.23.0
