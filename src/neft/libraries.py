"""What other libraries print."""

import logging
import warnings

_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")


def silence_libraries() -> None:
    """Keep from users what one library tells the authors of another."""
    warnings.simplefilter("ignore", FutureWarning)
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
    # Whatever trains imports it where it is installed, and then it sets a level of its own.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
