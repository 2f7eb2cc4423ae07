"""The libraries' own words, held back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own progress bars and warnings: what they would say of weights we raise, and the rest helps nobody."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [
        (logging, logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in (diffusers_logging, transformers_logging)
    ]
    for logging, _, _ in before:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, verbosity, shows_progress in before:
            logging.set_verbosity(verbosity)
            if shows_progress:
                logging.enable_progress_bar()
