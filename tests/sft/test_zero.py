"""What DeepSpeed is told; that it then trains as one process does, tests/distributed shows."""

from __future__ import annotations

import pytest

from neft.sft.zero import STAGES, configuration


@pytest.mark.parametrize("engine", STAGES)
def test_what_is_trained_is_never_cast(engine: str) -> None:
    for dtype in ("float32", "bfloat16"):
        for masters in (True, False):
            assert configuration(engine, dtype, masters=masters)["bf16"] == {"enabled": False}


@pytest.mark.parametrize("engine", STAGES)
def test_masters_are_multiplied_in_16_bits_and_summed_in_32(engine: str) -> None:
    autocast = configuration(engine, "bfloat16", masters=True)["torch_autocast"]
    assert autocast == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert "torch_autocast" not in configuration(engine, "bfloat16", masters=False)
    assert "torch_autocast" not in configuration(engine, "float32", masters=True)


def test_no_buffer_holds_two_dtypes() -> None:
    key = "stage3_param_persistence_threshold"
    over = {
        dtype: configuration("zero3", dtype, masters=False)["zero_optimization"][key]
        for dtype in ("float32", "bfloat16")
    }
    assert over == {"float32": "auto", "bfloat16": 0}
