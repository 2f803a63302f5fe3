"""Accuracy and macro-F1 of labels that a model writes.

Case and outer whitespace of a label do not count; everything else does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from neft.evaluation.metric import Array, Expected, format_signature


def _label(text: str) -> str:
    return text.strip().casefold()


_MATCH = {"match": "exact", "case": "fold"}


class Accuracy:
    """Share of predictions that name the expected label."""

    def __init__(self, expected: Expected) -> None:
        self._references = [_label(reference) for reference in expected.references]

    def statistics(self, predictions: Sequence[str]) -> Array:
        """1 for a hit, and 1: the number of examples once summed."""
        pairs = zip(map(_label, predictions), self._references, strict=True)
        return np.array([(label == reference, 1) for label, reference in pairs], np.float64)

    def scores(self, sums: Array) -> Array:
        """Hits in percent."""
        return 100.0 * sums[:, 0] / sums[:, 1]

    def signature(self, resampling: Mapping[str, int]) -> str:
        """How labels are matched."""
        return format_signature(resampling, _MATCH)


class MacroF1:
    """Mean over the labels of each label's F1.

    A label that is neither expected nor predicted anywhere has no F1, and is left out of the mean. What
    is predicted beside the labels counts against the label that was expected.
    """

    def __init__(self, expected: Expected) -> None:
        self._references = [_label(reference) for reference in expected.references]
        given = map(_label, expected.labels or ())
        self._labels = list(dict.fromkeys([*given, *sorted(set(self._references))]))

    def statistics(self, predictions: Sequence[str]) -> Array:
        """For each label whether it is a hit, then whether it is predicted, then whether expected."""
        labels = np.array(self._labels)
        predicted = np.array([_label(text) for text in predictions])[:, None] == labels
        expected = np.array(self._references)[:, None] == labels
        return np.hstack([predicted & expected, predicted, expected]).astype(np.float64)

    def scores(self, sums: Array) -> Array:
        """Mean F1 in percent."""
        hits, predicted, expected = np.split(sums, 3, axis=1)
        occurrences = predicted + expected
        occurs = occurrences > 0
        f1 = np.divide(2.0 * hits, occurrences, out=np.zeros_like(hits), where=occurs)
        mean: Array = 100.0 * f1.sum(1) / occurs.sum(1)
        return mean

    def signature(self, resampling: Mapping[str, int]) -> str:
        """How labels are matched, and how many there are."""
        return format_signature(resampling, {"labels": len(self._labels), **_MATCH})
