import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from neft.errors import OutOfMemoryError
from neft.memory import (
    Available,
    available_memory,
    naming_shortage,
    of_container,
    peak_memory,
    release_free_memory,
    reset_peak_memory,
    resident_memory,
)

MEGABYTE = 2**20


def test_the_peak_holds_what_was_freed_since_and_forgets_what_was_freed_before() -> None:
    reset_peak_memory()
    before = peak_memory()
    torch.ones(64 * MEGABYTE)  # 256 MiB
    with_tensor = peak_memory()
    reset_peak_memory()
    after = peak_memory()
    assert before is not None
    assert with_tensor is not None
    assert after is not None
    assert with_tensor - before > 200 * MEGABYTE
    assert with_tensor - after > 200 * MEGABYTE


def test_freed_memory_does_not_count_in_what_comes_next() -> None:
    release_free_memory()
    # Each too small to come from the system by itself; one at the end of the heap is kept.
    blocks = [bytearray(60_000) for _ in range(4000)]
    kept = blocks[-1]
    cycle: list[object] = [blocks]
    cycle.append(cycle)
    del blocks, cycle
    reset_peak_memory()
    before = peak_memory()
    release_free_memory()
    reset_peak_memory()
    after = peak_memory()
    assert kept is not None
    assert before is not None
    assert after is not None
    assert before - after > 200e6


@pytest.mark.parametrize(
    "files",
    [
        {
            "memory.max": "8000\n",
            "memory.current": "7000\n",
            "memory.stat": "anon 1000\nfile 6000\ninactive_file 4500\nactive_file 1500\n",
        },
        {
            "memory/memory.limit_in_bytes": "8000\n",
            "memory/memory.usage_in_bytes": "7000\n",
            "memory/memory.stat": "cache 6000\ninactive_file 20\ntotal_inactive_file 4500\n",
        },
    ],
    ids=["v2", "v1"],
)
def test_in_a_container_cached_files_are_free(files: dict[str, str], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert list(of_container(tmp_path)) == [Available("container", 8000, 5500)]


def test_a_container_without_a_limit(tmp_path: Path) -> None:
    assert list(of_container(tmp_path)) == []
    (tmp_path / "memory.max").write_text("max\n")
    assert list(of_container(tmp_path)) == []


# More than any machine can address; every attempt really fails.
BEYOND = 2**50


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(BEYOND, dtype=torch.uint8),
        lambda: np.empty(BEYOND, dtype=np.uint8),
        lambda: bytearray(BEYOND),
        lambda: mmap.mmap(-1, BEYOND),
    ],
    ids=["torch", "numpy", "python", "system"],
)
def test_failed_allocations_are_one_error(allocate) -> None:
    with (
        pytest.raises(OutOfMemoryError, match="step 3: memory ran out") as told,
        naming_shortage(lambda: "step 3"),
    ):
        allocate()
    assert told.value.__cause__ is not None


def test_other_errors_pass() -> None:
    for error in (RuntimeError("shapes differ"), OSError(2, "No such file"), KeyError("x")):
        with pytest.raises(type(error)), naming_shortage(lambda: "step 3"):
            raise error


def test_what_is_held_and_what_there_is() -> None:
    before = resident_memory()
    tensor = torch.ones(64 * MEGABYTE)
    after = resident_memory()
    there = available_memory()
    assert before is not None
    assert after is not None
    assert there is not None
    assert after - before > 200 * MEGABYTE
    assert tensor.nbytes < there.total
    assert 0 < there.free < there.total


def test_the_tightest_limit_counts() -> None:
    limited = (
        "import resource, torch; from neft.memory import available_memory;"
        "resource.setrlimit(resource.RLIMIT_AS, (10**11, 10**11));"
        "resource.setrlimit(resource.RLIMIT_AS, (10**10, 10**10));"
        "there = available_memory(); print(there.place, there.total, there.free > 10**6)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", limited], capture_output=True, text=True, check=True
    )
    place, total, has_some = ended.stdout.split()
    # A machine with less memory than that is the tighter of the two.
    assert (place == "process" and total == str(10**10)) or place in ("machine", "container")
    assert has_some == "True"
