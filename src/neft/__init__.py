"""Neuron-level fine-tuning of language models.

    from neft import NeftConfig, score_neurons
    from peft import get_peft_model

    scores = score_neurons("org/base-model", "runs/warmup")
    neurons = scores.select(percent=9)
    model = get_peft_model(model, NeftConfig(neurons=neurons))

Importing this package registers NeFT with PEFT, now or when PEFT is imported, so that
``PeftModel.from_pretrained`` knows NeFT adapters. Heavy parts load at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

if TYPE_CHECKING:
    from neft.neurons import Axis as Axis
    from neft.neurons import NeuronScores as NeuronScores
    from neft.neurons import NeuronSet as NeuronSet
    from neft.neurons import Projection as Projection
    from neft.products import faster_linear as faster_linear
    from neft.projections import find_projections as find_projections
    from neft.scoring import score_neurons as score_neurons
    from neft.tuner import NeftConfig as NeftConfig
    from neft.tuner import NeftModel as NeftModel

_HOMES = {
    "Axis": "neft.neurons",
    "NeftConfig": "neft.tuner",
    "NeftModel": "neft.tuner",
    "NeuronScores": "neft.neurons",
    "NeuronSet": "neft.neurons",
    "Projection": "neft.neurons",
    "faster_linear": "neft.products",
    "find_projections": "neft.projections",
    "score_neurons": "neft.scoring",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'neft' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


def _register(peft: Any) -> None:
    from neft.tuner.registration import register

    register(peft)


wrapt.register_post_import_hook(_register, "peft")
