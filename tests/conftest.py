"""What every test runs under: two threads, no hub, reproducible hypotheses, and torch's global generator left alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of a hub client, which reads it once

import hypothesis
import pytest
import torch

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(2)
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test whose body moved torch's global generator: a library that draws from it breaks its user's seeds.

    Building a layer draws too. A test that needs one keeps its draws to itself by ``torch.random.fork_rng()``, makes
    the layer in a fixture, or carries the mark ``touches_global_rng``.
    """
    before = torch.random.get_rng_state()
    outcome = yield
    untouched = torch.equal(before, torch.random.get_rng_state())
    if not untouched:
        torch.random.set_rng_state(before)
    if not untouched and item.get_closest_marker("touches_global_rng") is None:
        pytest.fail(
            "torch's global generator was drawn from or seeded; pass a generator, or see conftest", pytrace=False
        )
    return outcome


@pytest.fixture(autouse=True)
def no_accelerator_left() -> Generator[None]:
    """Fail a test that leaves an accelerator behind, whose device and precision the next test would be bound to."""
    yield
    module = sys.modules.get("accelerate.state")
    if module is not None and module.AcceleratorState._shared_state:
        module.AcceleratorState._reset_state(reset_partial_state=True)
        pytest.fail("an accelerator was left; use scrimp.jobs.engine.accelerated", pytrace=False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that is no part of the project: ``$SCRIMP_DATA``, or ``../shared/data``."""
    folder = Path(os.environ.get("SCRIMP_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set SCRIMP_DATA to the folder that holds it")
    return folder
