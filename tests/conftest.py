from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import medmeta.adaptation

# The suite runs on several workers: one thread each is faster than all of them fighting over the cores.
torch.set_num_threads(1)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real labelled scans that stands beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real scans in {SHARED_DATA.name}/ beside the checkout")
    return SHARED_DATA


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def overview_from_the_first_step() -> Iterator[None]:
    """So that a test of a few steps has an overview too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(medmeta.adaptation, "OVERVIEW_FROM", 0)
        yield
