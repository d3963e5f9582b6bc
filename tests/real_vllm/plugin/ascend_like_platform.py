"""The platform class: imported by vLLM once the plugin says that it is the one."""

from ascend_like import KEY
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import PlatformEnum


class AscendLikePlatform(CpuPlatform):
    _enum = PlatformEnum.CPU
    pass_key = KEY

    @classmethod
    def get_pass_manager_cls(cls):
        return "ascend_like.PassManager"

    @classmethod
    def get_compile_backend(cls):
        return "ascend_like_compiler.Compiler"

    @classmethod
    def check_and_update_config(cls, vllm_config):
        from vllm.config import CompilationMode

        wanted = vllm_config.compilation_config.mode
        super().check_and_update_config(vllm_config)
        config = vllm_config.compilation_config
        if wanted == CompilationMode.VLLM_COMPILE:
            config.mode = wanted
            config.backend = cls.get_compile_backend()
            config.compile_sizes = config.compile_sizes or []
            config.set_splitting_ops_for_v1(
                all2all_backend=vllm_config.parallel_config.all2all_backend,
                data_parallel_size=vllm_config.parallel_config.data_parallel_size,
            )
