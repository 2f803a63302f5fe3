"""The figures of a run by name; apart from what draws them, so that ``neft plot --help`` stays fast."""

from __future__ import annotations

from collections.abc import Mapping

DESCRIPTIONS: Mapping[str, str] = {
    "training": "training curves of the warm-up and of the training",
    "neurons": "where the trained neurons are: layers and projections",
    "scores": "histogram of the scores, with the selection in it",
    "figure3": "rank change by percentile of rank (Figure 3)",
    "figure5": "average rank change (Figure 5)",
    "figure6": "strongly affected, suppressed, indirectly affected neurons (Figure 6)",
    "overlap": "shared neurons of selections, beside chance (Table 5)",
    "causal": "what restoring groups of neurons costs",
}
"""Name -> what is to be seen."""
