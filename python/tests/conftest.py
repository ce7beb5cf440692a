"""What the tests share: seeds, no gradients, and the devices they run on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test's tensors are."""
    return str(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests run where there is a GPU; SPARGE_REQUIRE_CUDA=1 makes their absence a failure."""
    if torch.cuda.is_available() or os.environ.get("SPARGE_REQUIRE_CUDA") == "1":
        return
    skip = pytest.mark.skip(reason="no GPU (SPARGE_REQUIRE_CUDA=1 makes this a failure)")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
