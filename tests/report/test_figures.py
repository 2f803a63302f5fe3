"""Figures: that what should be drawn is there, by the text of the SVG, and the same bytes each time."""

from __future__ import annotations

from pathlib import Path

from neft.report.figures import Panel, Point, draw_scores


def panels() -> list[Panel]:
    first = {
        "NeFT": [Point("NeFT 3%", 4_000_000, 20.0, 1.0), Point("NeFT 9%", 12_000_000, 25.0, None)],
        "LoRA": [Point("LoRA", 12_000_000, 22.0, None)],
    }
    return [
        Panel("en-fr", "BLEU", first, base=1.5),
        Panel("summaries", "ROUGE-L", {"NeFT": [], "LoRA": first["LoRA"]}),
    ]


def svg(folder: Path) -> str:
    files = draw_scores(folder / "figure2", panels(), "Quality")
    assert [file.name for file in files] == ["figure2.png", "figure2.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    return files[1].read_text(encoding="utf-8")


def test_everything_is_there(tmp_path) -> None:
    text = svg(tmp_path)
    # matplotlib writes each text as a comment before its glyphs.
    for shown in ("Quality", "en-fr", "summaries", "BLEU", "ROUGE-L", "base model"):
        assert f"<!-- {shown} -->" in text
    assert "trained parameters (millions)" in text
    # One legend, whatever the number of panels.
    assert text.count("<!-- NeFT -->") == text.count("<!-- LoRA -->") == 1


def test_a_series_has_the_same_colour_in_all_panels(tmp_path) -> None:
    text = svg(tmp_path)
    blue, vermilion = text.casefold().count("#0072b2"), text.casefold().count("#d55e00")
    assert blue > 0
    # LoRA is in both panels, though NeFT, before it in the list, is missing from the second.
    assert vermilion > 0
    assert "#009e73" not in text.casefold()


def test_the_same_numbers_give_the_same_bytes(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert svg(tmp_path / "a") == svg(tmp_path / "b")
    pngs = [(tmp_path / name / "figure2.png").read_bytes() for name in "ab"]
    assert pngs[0] == pngs[1]
