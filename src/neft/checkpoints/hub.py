"""Checkpoints on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from neft.checkpoints.folder import INDEX, SINGLE
from neft.errors import CheckpointError


def fetch(model_id: str, revision: str | None) -> Path:
    """Bring weights and configuration into the local cache; returns the folder there.

    Raises:
        CheckpointError: no such model, or no way to fetch it.
    """
    from huggingface_hub import snapshot_download

    wanted = ["config.json", SINGLE, INDEX, "model-*-of-*.safetensors"]
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        place = model_id if revision is None else f"{model_id}@{revision}"
        raise CheckpointError(
            f"{place}: no such folder here, and no weights can be fetched under that id from the Hub. "
            f"Check the spelling and the network. ({error})"
        ) from error
