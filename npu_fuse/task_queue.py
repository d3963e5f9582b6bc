"""The level of torch_npu's task queue. Imports no torch: the doctor asks where torch cannot be imported."""

from __future__ import annotations

import os
import sys
from typing import Any


def task_queue_level() -> str:
    """ "0", "1" or "2": at run time since torch_npu 2.13, before that the environment's. Blocking launches are 0."""
    if os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        return "0"
    npu: Any = getattr(sys.modules.get("torch"), "npu", None)
    try:
        return str(npu.get_task_queue_enable())
    except Exception:
        return os.environ.get("TASK_QUEUE_ENABLE", "1")
