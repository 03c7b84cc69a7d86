"""Memory limits as the kernel shows them, of both versions of control groups."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fieldmark.runtime.memory import available_bytes, peak_resident_bytes

GB = 2**30


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    write(
        tmp_path / "proc",
        {"meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {32 * 2**20} kB"},
    )
    return tmp_path / "proc"


def room(proc: Path, cgroup_line: str, files: dict[str, object]) -> tuple[int, str]:
    write(proc, {"self/cgroup": cgroup_line})
    sys_fs = proc.parent / "fs"
    write(sys_fs / "cgroup", files)
    found = available_bytes(proc=proc, sys_fs=sys_fs)
    return found.num_bytes, found.source


def test_without_a_limit_it_is_what_the_machine_has_available(proc: Path) -> None:
    found = room(proc, "0::/job", {"job/memory.max": "max", "job/memory.current": GB})
    assert found == (32 * GB, "this machine")


def test_version_2_takes_the_tightest_group_above_and_leaves_out_the_page_cache(
    proc: Path,
) -> None:
    found = room(
        proc,
        "0::/slurm/job_7/step_0",
        {
            "slurm/job_7/memory.max": 8 * GB,
            "slurm/job_7/memory.current": 5 * GB,
            "slurm/job_7/memory.stat": f"anon 1\ninactive_file {2 * GB}\nslab 3",
            "slurm/job_7/step_0/memory.max": "max",
            "slurm/job_7/step_0/memory.current": 5 * GB,
            "memory.max": 20 * GB,
            "memory.current": 0,
        },
    )
    assert found == (5 * GB, "the control group's memory.max")


def test_version_1_and_its_number_for_no_limit(proc: Path) -> None:
    line = "5:cpu:/a\n4:memory:/docker/x"
    files: dict[str, object] = {
        "memory/docker/x/memory.limit_in_bytes": 9223372036854771712,
        "memory/docker/x/memory.usage_in_bytes": GB,
    }
    assert room(proc, line, files) == (32 * GB, "this machine")
    files |= {
        "memory/docker/x/memory.limit_in_bytes": 4 * GB,
        "memory/docker/x/memory.stat": f"cache 1\ntotal_inactive_file {GB // 2}",
    }
    assert room(proc, line, files) == (7 * GB // 2, "the control group's memory.limit_in_bytes")


def test_in_a_container_the_own_group_is_the_root(proc: Path) -> None:
    found = room(proc, "0::/../../host/path", {"memory.max": 3 * GB, "memory.current": 4 * GB})
    assert found == (0, "the control group's memory.max")  # over it already: not less than none


CHILD = """
import resource
from fieldmark.runtime.memory import available_bytes
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
room = available_bytes()
print(room.num_bytes, room.source)
bytearray(int(room.num_bytes * 0.9))
try:
    bytearray(int(room.num_bytes * 1.1))
except MemoryError:
    print("full")
"""


@pytest.mark.slow
def test_a_real_limit_of_the_address_space_is_the_one_that_holds() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    first, last = done.stdout.splitlines()
    assert first.endswith("ulimit -v")
    assert last == "full"


def test_this_machine_s_own_facts_are_read() -> None:
    found = available_bytes()
    assert 0 < found.num_bytes < 2**50
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 0 < peak_resident_bytes() <= peak + 2**20


HEAPS = """
import ctypes, sys, threading
from fieldmark.runtime.memory import share_one_heap
if sys.argv[1] == "one" and not share_one_heap():
    sys.exit("no glibc")
together = threading.Barrier(8)
def work():
    kept = [bytes(1000 + n) for n in range(50_000, 50_100)]
    together.wait(10)
threads = [threading.Thread(target=work) for _ in range(8)]
for one in threads:
    one.start()
for one in threads:
    one.join()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
out = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, ctypes.c_void_p(out))
libc.fclose(ctypes.c_void_p(out))
"""


def test_threads_share_a_heap_where_they_are_told_to(tmp_path: Path) -> None:
    counts = {}
    for how in ("one", "many"):
        command = [sys.executable, "-c", HEAPS, how, str(tmp_path / how)]
        done = subprocess.run(command, capture_output=True, text=True)
        if "no glibc" in done.stderr:
            pytest.skip("this system's malloc has no heaps for threads")
        assert done.returncode == 0, done.stderr
        counts[how] = (tmp_path / how).read_text().count("<heap nr=")
    assert counts["one"] == 1
    assert counts["many"] > 1
