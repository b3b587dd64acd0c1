"""What the libraries print stays off the user's screen."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

from quantize.process_memory import collector_paused

NOISY_LOGGERS = ("transformers", "bitsandbytes", "accelerate", "datasets", "huggingface_hub", "torch", "awq")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence banners, loading bars, warnings and log lines of the libraries inside the block; errors come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    levels = {logger: logger.level for logger in map(logging.getLogger, NOISY_LOGGERS)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        # record=True: some libraries reset the filters while they are imported, and then warn.
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("ignore")
            with collector_paused():
                from transformers.utils import logging as transformers_logging

            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
