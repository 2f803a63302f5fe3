"""What other libraries print."""

import logging
import warnings

_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")


def silence_libraries() -> None:
    """Keep from users what one library tells the authors of another."""
    warnings.simplefilter("ignore", FutureWarning)
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
