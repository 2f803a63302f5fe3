"""NeFT as a PEFT method: the chosen neurons are the only trainable vectors."""

# PEFT first: its import registers NeFT (see neft/__init__.py), which imports the modules below.
import peft as _peft  # noqa: F401

from neft.tuner.config import NeftConfig
from neft.tuner.experts import NeftExperts
from neft.tuner.layer import NeftLinear
from neft.tuner.model import NeftModel

__all__ = ["NeftConfig", "NeftExperts", "NeftLinear", "NeftModel"]
