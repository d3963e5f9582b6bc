"""Adds the stand-in's kernels to torch_npu as soon as a process has imported it.

scripts/npu-host puts this folder on PYTHONPATH; nothing here is installed with npu_fuse.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType


class _After(importlib.abc.Loader):
    """Loads torch_npu as its own loader does, then the kernels."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        before = os.path.join(os.environ["NPU_HOST"], "cuda_torch.so")
        if os.path.exists(before):
            ctypes.CDLL(before)
        self.loader.exec_module(module)
        import npu_host_ops

        npu_host_ops.install()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch_npu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _After(spec.loader)
        return spec


if "NPU_HOST" in os.environ:
    sys.meta_path.insert(0, _Finder())
