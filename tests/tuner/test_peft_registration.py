"""``import neft`` makes NeFT known to PEFT, in whatever order the two are imported."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import peft
import pytest
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils.peft_types import PeftType

from neft import NeftConfig, NeftModel
from neft.tuner.registration import register

FIRST_LINES = (
    "import neft; import peft",
    "import peft; import neft",
    "from neft import NeftConfig",
    "from neft.tuner.config import NeftConfig",
    "from neft.tuner.layer import NeftLinear",
    "import neft; from peft import PeftModel",
)
IN_FRESH_PROCESSES = """
import os, sys
import accelerate, torch  # what is heavy, once for all
from transformers import PreTrainedModel
for first_line in sys.argv[1:]:
    child = os.fork()
    if not child:
        exec(first_line)
        from peft.utils.peft_types import PeftType
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
        import neft
        os._exit(PEFT_TYPE_TO_TUNER_MAPPING[PeftType.NEFT] is not neft.NeftModel)
    if os.waitpid(child, 0)[1]:
        sys.exit(first_line)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, to import torch only once")
def test_import_order():
    subprocess.run([sys.executable, "-c", IN_FRESH_PROCESSES, *FIRST_LINES], check=True)


def test_import_alone_is_light():
    """So that the command line answers at once."""
    heavy = "torch", "peft", "transformers"
    check = f"import neft, sys; assert not {{*{heavy}}} & {{*sys.modules}}, 'heavy'; dir(neft)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_enum_has_a_real_member():
    member = PeftType["NEFT"]
    assert member is PeftType("NEFT") is PeftType.NEFT
    assert member in PeftType
    assert [*PeftType].count(member) == 1
    assert (member.name, member.value, member == "NEFT") == ("NEFT", "NEFT", True)
    assert repr(member) == "<PeftType.NEFT: 'NEFT'>"
    assert str(member) == str(PeftType.LORA).replace("LORA", "NEFT")
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member
    assert {member: 1}["NEFT"] == 1


def test_registering_twice_is_harmless():
    members = [*PeftType]
    register()
    register(peft)
    assert [*PeftType] == members
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.NEFT] is NeftModel
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.NEFT] is NeftConfig
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.NEFT] == "neft_"


def test_another_method_of_that_name_is_not_replaced(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.NEFT, peft.LoraModel)
    with pytest.raises(ImportError, match="has a method NEFT of its own"):
        register()
