import signal
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

# More threads than free cores make tiny models a hundred times slower (OpenMP barriers spin), and xdist runs several.
torch.set_num_threads(1)
logging.set_verbosity_error()

# What a shell starts in the background ignores Ctrl-C, and so does all that it starts: tests that press it would wait.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW = (
    "distributed",
    "experts",
    "recipes",
    "training",
    "balancing/test_balance.py",
    "balancing/test_routing.py",
    "balancing/test_selection.py",
    "checks/test_coord_check.py",
    "scaling/test_exactness.py",
    "scaling/test_gradients.py",
    "scaling/test_scales.py",
    "structure/test_drift.py",
    "structure/test_families.py",
    "structure/test_fans.py",
    "structure/test_garbage.py",
    "structure/test_shape.py",
    "structure/test_suggest.py",
    "tuning/test_drift.py",
    "tuning/test_ledger.py",
    "tuning/test_search.py",
    "tuning/test_transfer.py",
    "tuning/test_tune.py",
    "test_docs.py",
)
"""Not in `make check`, which is to take three minutes: what starts processes, trains, or goes through many families."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(here).as_posix()
        if path.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
