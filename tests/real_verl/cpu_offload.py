"""An external library for verl: its reference model asks for pinned memory, which needs an accelerator."""

import sys

from npu_fuse.integrations.verl import ENGINE_MODULE, _WhenImported


def mend(module):
    policy = module.CPUOffloadPolicy
    module.CPUOffloadPolicy = lambda pin_memory=True: policy(pin_memory=False)


if ENGINE_MODULE in sys.modules:
    mend(sys.modules[ENGINE_MODULE])
else:
    sys.meta_path.insert(0, _WhenImported(ENGINE_MODULE, mend))
