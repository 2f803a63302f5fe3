"""Makes NeFT known to PEFT.

PEFT has no plug-in point: ``register_peft_method`` insists on a member of its ``PeftType`` enum, and
callers read ``.peft_type.value``. So the enum gets a real member, once.
"""

from __future__ import annotations

from typing import Any

NAME = "NEFT"
PREFIX = "neft_"


def register(_peft: Any = None) -> None:
    """Register NeFT with the installed PEFT; does nothing the second time.

    Raises:
        ImportError: this PEFT has another method of the same name.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method
    from peft.utils.peft_types import PeftType

    if NAME not in PeftType.__members__:
        _add_member(PeftType, NAME)

    from neft.tuner.config import NeftConfig
    from neft.tuner.model import NeftModel

    registered = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType[NAME])
    if registered is NeftModel:
        return
    if registered is not None:
        raise ImportError(f"The installed PEFT has a method {NAME} of its own: {registered}.")
    register_peft_method(
        name=NAME.lower(), config_cls=NeftConfig, model_cls=NeftModel, prefix=PREFIX
    )


def _add_member(enumeration: Any, name: str) -> None:
    """Add ``name = "name"`` to a string enum that is already built."""
    member = str.__new__(enumeration, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(enumeration)
    # The class attribute first: once the name is in the member map, assignment is refused.
    setattr(enumeration, name, member)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[name] = member
