import torch

from neft.memory import peak_memory, reset_peak_memory

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
