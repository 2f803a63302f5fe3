"""The paper's score: how far each neuron has turned, over two checkpoints that are read as a stream."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track

from neft import __version__
from neft.checkpoints import Matrix, WeightSource, open_weights
from neft.errors import CheckpointError
from neft.neurons import Axis, NeuronScores, PathLike, Projection
from neft.projections import find_candidates
from neft.scoring.distance import LARGEST, cosine_distances, scoring_threads
from neft.scoring.rounding import Rounding, find_rounding
from neft.scoring.weights import check_weights

if TYPE_CHECKING:
    from torch import nn

_log = logging.getLogger(__name__)

# Rows of a matrix that are searched at once for a value that is not finite.
_SEARCHED_ROWS = 256


def score_neurons(
    before: PathLike | nn.Module | WeightSource,
    after: PathLike | nn.Module | WeightSource,
    modules: Sequence[str] | None = None,
    *,
    axes: Mapping[str, Axis] | None = None,
    exact_start: bool = False,
    progress: bool = True,
) -> NeuronScores:
    """Cosine similarity of every neuron before and after fine-tuning (Algorithm 1, step 2).

    Both sides are read one matrix at a time, so memory is bounded by a pair of the largest matrices. Sums
    are float64 whatever the dtypes, and the result is ``1 - cos`` without cancellation.

    Args:
        before: the original model M_Org: a checkpoint folder (safetensors and ``config.json``), a Hub id,
            a module, or what ``open_weights`` returned.
        after: the same model after a short full fine-tune, M_FT; it needs no ``config.json``. Its weights
            should be float32: with 16 bits, rounding moves neurons as far as a short fine-tune does. An
            adapter counts as far as it is merged into them.
        modules: projections to score, by role, module name or pattern (see ``find_projections``);
            default: up and down.
        axes: pattern of module names -> axis, for modules that the architecture table does not know.
        exact_start: whether ``after`` is known to be trained from exactly the weights of ``before``; if
            these have 16 bits, nothing was rounded then, and there is no warning.
        progress: whether to show a progress bar on stderr, if that is a terminal.

    Returns:
        Distances ``1 - cos`` in 0..2 of all neurons of these projections. A neuron that is zero on both
        sides has 0, on one side 1.

    Raises:
        ArchitectureError: projections that the model does not have.
        NeuronError: the weight of one is tied to another's.
        CheckpointError: weights that are missing, torn, quantized or not finite, or that differ in name
            or shape between the two sides, or of which no neuron differs in direction.
    """
    original, tuned = _opened(before), _opened(after)
    projections = find_candidates(original.network, modules, axes)
    for source in (original, tuned):
        check_weights(source, projections)
    pairs = [_Pair(p, (original.matrix(p), tuned.matrix(p))) for p in projections]
    total_parameters = original.num_parameters
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    distances: dict[str, npt.NDArray[np.float64]] = {}
    with scoring_threads() as pool:
        for pair in track(pairs, "Scoring", console=console, transient=True, disable=hidden):
            distances[pair.projection.name] = pair.distances(pool)
    _check_turned(distances, original, tuned)
    dtypes_before, dtypes_after = ({pair.dtypes[side] for pair in pairs} for side in (0, 1))
    provenance: dict[str, Any] = {
        "method": "cosine",
        "before": original.label,
        "after": tuned.label,
        "dtypes": {"before": sorted(dtypes_before), "after": sorted(dtypes_after)},
        "neft": __version__,
    }
    if rounding := find_rounding(dtypes_after, distances.values()):
        provenance["rounding"] = asdict(rounding)
        _warn(rounding, tuned, "Keep and score the float32 weights of the fine-tune.")
    elif not exact_start and (rounding := find_rounding(dtypes_before, distances.values())):
        start = f"exactly these {rounding.dtype} weights"
        _warn(rounding, original, f"Disregard this if {tuned.label} was trained from {start}.")
    return NeuronScores(projections, distances, total_parameters, provenance)


def _opened(side: PathLike | nn.Module | WeightSource) -> WeightSource:
    return side if isinstance(side, WeightSource) else open_weights(side)


@dataclass(frozen=True)
class _Pair:
    """One projection's weight on both sides."""

    projection: Projection
    sides: tuple[Matrix, Matrix]

    @property
    def dtypes(self) -> tuple[str, str]:
        """Stored dtypes, before and after."""
        before, after = self.sides
        return before.dtype, after.dtype

    def distances(self, pool: Executor) -> npt.NDArray[np.float64]:
        """``1 - cos`` of each neuron, float64 ``[num_neurons]``."""
        before, after = (matrix.read() for matrix in self.sides)
        found = cosine_distances(before, after, self.projection.neuron_dim, pool)
        if found.isnan().any():
            raise self._not_finite(before, after)
        return found.numpy()

    def _not_finite(self, *tensors: torch.Tensor) -> CheckpointError:
        for matrix, tensor in zip(self.sides, tensors, strict=True):
            for start, rows in enumerate(tensor.split(_SEARCHED_ROWS)):
                bad = torch.nonzero(~(rows.double().abs() <= LARGEST))
                if len(bad):
                    row, column = bad[0].tolist()
                    return CheckpointError(
                        f"{matrix.source.label}: {matrix.name}[{start * _SEARCHED_ROWS + row}, {column}] "
                        f"is {rows[row, column].item()}. The training run that wrote it broke down; "
                        "score an earlier checkpoint."
                    )
        raise AssertionError(f"{self.projection.name}: NaN distances from finite weights")


def _check_turned(
    distances: Mapping[str, npt.NDArray[np.float64]], original: WeightSource, tuned: WeightSource
) -> None:
    if not any(values.any() for values in distances.values()):
        raise CheckpointError(
            f"{tuned.label}: no neuron of the {len(distances)} scored projections differs in direction "
            f"from that of {original.label}. Give the model after fine-tuning, an adapter merged into it "
            "(model.merge_and_unload()), and in modules projections that were trained."
        )


def _warn(rounding: Rounding, rounded: WeightSource, remedy: str) -> None:
    _log.warning(
        "%s holds %s weights. Rounding to %s alone moves a neuron by 1 - cos of about %.1e, hardly any "
        "by more than %.1e, and %.1f%% of the neurons moved no more than that: their order may be noise. "
        "%s",
        rounded.label,
        rounding.dtype,
        rounding.dtype,
        rounding.typical,
        rounding.floor,
        100 * rounding.share_below,
        remedy,
    )
