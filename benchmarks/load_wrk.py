"""Closed loop: so many clients, each sending its next request when it has its answer (wrk)."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

# The bodies are read once for each thread, and sent in turn. wrk counts answers of 400 and more.
_SCRIPT = """
local bodies, next_one = {}, 0
function init(args)
  for n = 1, tonumber(args[2]) do
    local file = io.open(args[1] .. "/" .. n .. ".body", "rb")
    bodies[n] = wrk.format("POST", nil, {["Content-Type"] = "%s"}, file:read("*all"))
    file:close()
  end
  next_one = tonumber(args[3])
end
function request()
  next_one = next_one %% #bodies + 1
  return bodies[next_one]
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '\\nresult {"answers": %%d, "seconds": %%f, "p50_ms": %%f, "p99_ms": %%f, ' ..
    '"refused": %%d, "broken": %%d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, e.status, e.connect + e.read + e.write + e.timeout))
end
"""


@dataclass(frozen=True)
class Bodies:
    """Request bodies in a folder, as 1.body, 2.body and so on."""

    folder: Path
    count: int
    content_type: str

    def read(self) -> list[bytes]:
        """Return all of them."""
        return [(self.folder / f"{n + 1}.body").read_bytes() for n in range(self.count)]


def write_forms(images: list[bytes], folder: Path) -> Bodies:
    """Write each image as a form with the field `request`, which every service here takes."""
    boundary = "fieldmark-benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    for n, image in enumerate(images):
        head = (
            f"--{boundary}\r\n"
            f'Content-Disposition: form-data; name="request"; filename="{n}.jpg"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        )
        body = head.encode() + image + f"\r\n--{boundary}--\r\n".encode()
        (folder / f"{n + 1}.body").write_bytes(body)
    return Bodies(folder, len(images), f"multipart/form-data; boundary={boundary}")


def write_images(images: list[bytes], folder: Path) -> Bodies:
    """Write each image as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, image in enumerate(images):
        (folder / f"{n + 1}.body").write_bytes(image)
    return Bodies(folder, len(images), "image/jpeg")


def closed_loop(url: str, bodies: Bodies, clients: int, seconds: float, first: int = 0) -> dict:
    """Return answers a second that are not refusals, p50 and p99 in ms, refusals and broken ones.

    Args:
        first: the body to begin with.
    """
    script = bodies.folder / "bodies.lua"
    script.write_text(_SCRIPT % bodies.content_type)
    command = ["wrk", "-t", "1", "-c", str(clients), "-d", f"{seconds:g}s", "--timeout", "60s"]
    command += ["-s", str(script), url, "--", str(bodies.folder), str(bodies.count), str(first)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = next(x for x in done.stdout.splitlines() if x.startswith("result "))
    found = json.loads(line.removeprefix("result "))
    good = found["answers"] - found["refused"]
    return {
        "clients": clients,
        "images_per_s": round(good / found["seconds"], 2),
        "p50_ms": round(found["p50_ms"], 1),
        "p99_ms": round(found["p99_ms"], 1),
        "refused": found["refused"],
        "broken": found["broken"],
    }
