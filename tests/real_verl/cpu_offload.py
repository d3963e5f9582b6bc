"""An external library for verl: its reference model asks for pinned memory, which needs an accelerator."""

import sys


def _mend():
    module = sys.modules.get("verl.workers.engine.fsdp.transformer_impl")
    if module is not None and not getattr(module, "npu_fuse_test_unpinned", False):
        policy = module.CPUOffloadPolicy
        module.CPUOffloadPolicy = lambda pin_memory=True: policy(pin_memory=False)
        module.npu_fuse_test_unpinned = True


_mend()
