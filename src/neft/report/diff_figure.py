"""The figure of ``neft diff``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from neft.analysis.diff import change_by_layer
from neft.analysis.table import Table
from neft.report.figures import write_figure
from neft.report.neuron_figures import draw_change_map


def save_change_map(table: Table, file: Path) -> None:
    """Draw how far each layer's projections moved.

    Args:
        table: see ``diff_table``.
        file: ends in ``.png`` or ``.svg``.
    """
    rows = [row for row in change_by_layer(table) if row["layer"] is not None]
    roles = [name for name in rows[0] if name != "layer"]
    change = np.array([[row[role] for row in rows] for role in roles], dtype=np.float64)
    figure = draw_change_map(change, [row["layer"] for row in rows], roles)
    write_figure(figure, file)
