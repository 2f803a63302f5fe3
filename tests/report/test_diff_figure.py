"""The map of ``neft diff``."""

from __future__ import annotations

import pytest

from neft.analysis.diff import diff_table
from neft.checkpoints import open_weights
from neft.report.diff_figure import save_change_map


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_map(tiny_model, tmp_path, suffix) -> None:
    sides = (open_weights(tiny_model(seed=seed)) for seed in (0, 1))
    file = tmp_path / f"map.{suffix}"
    save_change_map(diff_table(*sides, progress=False), file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    if suffix == "png":
        assert file.read_bytes().startswith(b"\x89PNG")
        return
    text = file.read_text(encoding="utf-8")
    for shown in ("up", "gate", "down", "q", "o", "layer", "change in %"):
        assert f"<!-- {shown} -->" in text
    # Independent random weights of one size lie sqrt(2) of their length apart.
    assert "<!-- 141 -->" in text
