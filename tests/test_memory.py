import torch

from neft.memory import peak_memory, release_free_memory, reset_peak_memory

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
