"""What other libraries print stays off the terminal."""

from __future__ import annotations

import logging

import pytest

from neft.libraries import silence_libraries


@pytest.mark.parametrize(("level", "is_shown"), [(logging.WARNING, False), (logging.ERROR, True)])
def test_deepspeed_is_quiet_though_it_sets_its_own_level(
    monkeypatch: pytest.MonkeyPatch, level: int, is_shown: bool
) -> None:
    logger = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(logger, "filters", [])
    silence_libraries()
    record = logger.makeRecord(logger.name, level, "", 0, "Setting accelerator to CPU.", (), None)
    assert bool(logger.filter(record)) == is_shown
