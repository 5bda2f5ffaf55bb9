"""One thread, one seed per test: a failure on one machine is a failure on every machine."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("densessl", deadline=None, derandomize=True)
hypothesis.settings.load_profile("densessl")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
