"""deploy/: what the unit and the container are told, done for real as far as this machine can."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from fieldmark.serving.limits import Limits
from fieldmark.serving.server import END_WITHIN_S

DEPLOY = Path(__file__).parents[3] / "deploy"
PROGRAM = str(Path(sys.executable).with_name("fieldmark"))


def unit(key):
    """The value of a key of the unit, which has each once."""
    [found] = re.findall(rf"(?m)^{key}=(.*)$", (DEPLOY / "fieldmark.service").read_text())
    return found


def instruction(name):
    """The list of an instruction of the Dockerfile's last stage, such as ENTRYPOINT."""
    last = re.split(r"(?m)^FROM ", (DEPLOY / "Dockerfile").read_text())[-1]
    return json.loads(re.search(rf"(?m)^{name}\b[^\[]*(\[[^\]]*\])", last)[1])


def with_free_port(arguments, package):
    """The arguments of `serve`, for this package and a port that is free."""
    arguments = [PROGRAM, *arguments[1:]]
    arguments[2] = str(package)
    arguments[arguments.index("--port") + 1] = "0"
    return [*arguments, "--drain-s", "0", "--json"]


class Started:
    """A command that serves and says where."""

    def __init__(self, command, **options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes, **options)

    def url(self):
        line = self.process.stdout.readline()
        if not line:
            pytest.fail(self.process.stderr.read())
        return json.loads(line)["url"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def test_the_unit_starts_says_so_and_ends(tiny_package, tmp_path):
    assert unit("Type") == "notify"
    assert unit("KillSignal") == "SIGTERM"
    assert int(unit("TimeoutStopSec")) >= Limits().drain_s + END_WITHIN_S
    assert int(unit("LimitNOFILE")) > Limits().max_connections
    command = with_free_port(shlex.split(unit("ExecStart")), tiny_package)
    told = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(told["NOTIFY_SOCKET"])
        supervisor.settimeout(20)
        with Started(command, env=os.environ | told) as started:
            assert httpx.get(f"{started.url()}/readyz").status_code == 200
            assert {supervisor.recv(100) for _ in range(4)} == {b"READY=1", b"WATCHDOG=1"}
            started.process.send_signal(signal.Signals[unit("KillSignal")])
            assert started.process.wait(20) == 0


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_every_line_of_the_unit(tmp_path):
    text = (DEPLOY / "fieldmark.service").read_text()
    found = tmp_path / "fieldmark.service"
    program = shlex.split(unit("ExecStart"))[0]
    assert program == "/opt/fieldmark/bin/fieldmark"
    found.write_text(text.replace(f"ExecStart={program} ", f"ExecStart={sys.executable} "))
    done = subprocess.run(
        ["systemd-analyze", "verify", found], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def can(*command):
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(
    os.getuid() != 0 or not can("unshare", "-m", "setpriv", "--version"),
    reason="needs root, unshare and setpriv, to give the rest away",
)
def test_the_container_s_command_needs_no_rights_and_no_file_to_write(tmp_path, tiny_package):
    """A root that is read only, no capability, and where it can run Python another user."""
    model = tmp_path / "model"
    shutil.copytree(tiny_package, model)
    command = with_free_port(instruction("ENTRYPOINT"), "/mnt")
    uid = re.search(r"(?m)^USER (\d+):\1$", (DEPLOY / "Dockerfile").read_text())[1]
    drop = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    other = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *drop]
    if not can(*other, PROGRAM, "--version"):  # this Python is in a folder of root's
        other = ["setpriv", *drop]
    model.chmod(0o755)
    script = (
        f"mount --bind {shlex.quote(str(model))} /mnt && mount -o remount,bind,ro /mnt && "
        "mount -o remount,bind,ro / && cd / && ! touch /tmp/written 2>/dev/null && "
        f"exec {shlex.join(other + command)}"
    )
    unknown = {"HOME": "/nonexistent", "XDG_CACHE_HOME": ""}
    with Started(["unshare", "-m", "sh", "-c", script], env=os.environ | unknown) as started:
        url = started.url().replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/readyz").status_code == 200
        status = Path(f"/proc/{started.process.pid}/status").read_text()
        assert re.search(r"(?m)^CapEff:\t0+$", status)
        assert re.search(r"(?m)^NoNewPrivs:\t1$", status)
        is_healthy = [sys.executable, *instruction("(?s:HEALTHCHECK.*?CMD)")[1:]]
        is_healthy[-1] = is_healthy[-1].replace("http://127.0.0.1:8000", url)
        assert url in is_healthy[-1]
        assert subprocess.run(is_healthy).returncode == 0
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(20) == 0
        assert subprocess.run(is_healthy, capture_output=True).returncode != 0
