"""What other libraries print stays off the terminal."""

from __future__ import annotations

import logging

import pytest

from neft.libraries import silence_libraries


def test_deepspeed_is_quiet_though_it_sets_its_own_level(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "propagate", True)
    silence_libraries()
    logger.setLevel(logging.WARNING)
    logger.warning("Setting accelerator to CPU.")
    logger.error("It broke.")
    assert caplog.messages == ["It broke."]
