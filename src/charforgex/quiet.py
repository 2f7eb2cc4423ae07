"""The libraries' own words, held back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module


@contextlib.contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Without the progress bars and warnings of `libraries` (diffusers and transformers, if none is named): what they would say of weights
    we raise, and the rest helps nobody."""
    loggings = [import_module(f"{name}.utils.logging") for name in libraries or ("diffusers", "transformers")]
    before = [(logging, logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in loggings]
    for logging in loggings:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, verbosity, shows_progress in before:
            logging.set_verbosity(verbosity)
            if shows_progress:
                logging.enable_progress_bar()
