"""The smallest neurons of the untrained model: a choice without data, to compare others with.

A move of one length turns a short vector further than a long one. So the neurons that a fine-tune turns
most are to a good part those that were short before, and a choice by length alone is a baseline that
every other way has to beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from neft import __version__
from neft.checkpoints import WeightSource, open_weights
from neft.neurons import Axis, NeuronScores, PathLike
from neft.projections import find_candidates
from neft.scoring.neuron_vectors import SMALLEST, neuron_vectors
from neft.scoring.weights import check_weights


def score_by_norm(
    base: PathLike | torch.nn.Module | WeightSource,
    modules: Sequence[str] | None = None,
    *,
    axes: Mapping[str, Axis] | None = None,
) -> NeuronScores:
    """Rank neurons by their length, the shortest first.

    Args:
        base: the original model: a checkpoint folder, Hub id, module, or what ``open_weights`` returned;
            read one matrix at a time.
        modules: projections to score (see ``find_projections``); default: up and down.
        axes: pattern of module names -> axis, for modules that the architecture table does not know.

    Returns:
        ``1 / (2 |w|²)``: the ``1 - cos`` of a small move across a neuron, over the square of its length.

    Raises:
        ArchitectureError: projections that the model does not have.
        NeuronError: the weight of one is tied to another's.
        CheckpointError: weights that are missing, quantized or not finite.
    """
    source = base if isinstance(base, WeightSource) else open_weights(base)
    projections = find_candidates(source.network, modules, axes)
    check_weights(source, projections)
    distances = {
        projection.name: np.concatenate(
            [
                (0.5 / vectors.square().sum(1).clamp(min=SMALLEST)).numpy()
                for _, vectors in neuron_vectors(source, projection)
            ]
        )
        for projection in projections
    }
    provenance = {"method": "norm", "before": source.label, "neft": __version__}
    return NeuronScores(projections, distances, source.num_parameters, provenance)
