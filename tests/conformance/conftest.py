"""Every test here needs the real wheel; the ordinary run leaves the marker out."""

from __future__ import annotations

import os

import pytest
import torch  # before npu_host_ops: it loads torch_npu, which loads that


@pytest.fixture(autouse=True)
def stand_in() -> None:
    if "NPU_HOST" not in os.environ:
        pytest.fail("run this with `scripts/npu-host python -m pytest -m real_wheel`", pytrace=False)
    import npu_host_ops

    torch.manual_seed(0)
    torch._dynamo.reset()
    npu_host_ops.reset_counts()
