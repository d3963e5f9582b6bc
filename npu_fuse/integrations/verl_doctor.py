"""`npu-fuse doctor --verl`: each row of the tuning guide for Ascend, answered for one run's own settings."""

from __future__ import annotations

import re
from collections.abc import Iterator

from npu_fuse.errors import NpuFuseError
from npu_fuse.findings import Finding
from npu_fuse.integrations.verl_config import RunConfig, read_run

MODEL, ACTOR, REF = "actor_rollout_ref.model", "actor_rollout_ref.actor", "actor_rollout_ref.ref"
ROLLOUT, CRITIC = "actor_rollout_ref.rollout", "critic"
SWITCH = f"{MODEL}.fused_kernel_options.npu_fuse"
LIBRARY = "npu_fuse.integrations.verl"
COMPILATION = f"{ROLLOUT}.engine_kwargs.vllm.compilation_config"
FULL = ("FULL", "FULL_DECODE_ONLY")
SMALL_MODEL = 7.0  # billions of parameters: below, the guide keeps them gathered between forward and backward

MEGATRON_FLAGS = {
    "use_flash_attn": "attention is not npu_fuse's: without it Megatron runs unfused attention",
    "use_fused_rmsnorm": "npu_rms_norm; npu_fuse does it where the layers are compiled",
    "use_fused_swiglu": "npu_swiglu; npu_fuse does it where the layers are compiled",
    "use_fused_rotary_pos_emb": "npu_rotary_mul; npu_fuse does it where the layers are compiled",
    "apply_rope_fusion": "the switch of Megatron's own that the line above needs too",
}
MEGATRON_MOE_FLAGS = {
    "moe_grouped_gemm": "npu_grouped_matmul for the experts",
    "fused_permute_unpermute": "npu_moe_token_permute and npu_moe_token_unpermute",
}


def verl_doctor(source: str) -> list[Finding]:
    """What a verl run's settings mean for fusing, one finding a row at least. Raises `OptionError` for the source."""
    config = read_run(source)
    training = [_megatron] if is_megatron(config) else [_switch, _fsdp]
    rows = [*training, _rollout_rows, _task_queue, _collectives]
    return [finding for row in rows for finding in row(config)]


def is_megatron(config: RunConfig) -> bool:
    named = config.get(f"{ACTOR}.strategy") == "megatron"
    return named or bool(config.under(f"{ACTOR}.megatron"))


def _add(key: str, value: object, plus: bool = False) -> str:
    return f"add {'+' if plus else ''}{key}={value}"


# --- FSDP --------------------------------------------------------------------------------------------


def _switch(config: RunConfig) -> Iterator[Finding]:
    from npu_fuse.integrations.verl_settings import settings_of

    library = LIBRARY in (config.get(f"{MODEL}.external_lib") or "")
    given = {key: _typed(value) for key, value in config.under(SWITCH).items()}
    try:
        settings = settings_of({"npu_fuse": given} if given else {})
    except NpuFuseError as error:
        yield Finding("verl.options", "error", str(error.args[0]), error.remedy)
        return
    if library and settings is not None:
        own = "left out" if settings.verl_patches == "off" else "kept"
        yield Finding("verl.switch", "ok", f"npu_fuse compiles every block of every model; verl's own patches: {own}")
        if config.under(CRITIC) and not config.flag(f"{CRITIC}.model.fused_kernel_options.npu_fuse.enable", False):
            line = SWITCH.replace(MODEL, f"{CRITIC}.model")
            remedy = f"{_add(f'{line}.enable', True, plus=True)} and {_add(f'{CRITIC}.model.external_lib', LIBRARY)}"
            yield Finding("verl.critic", "warning", "the critic has a switch of its own, which is off", remedy)
        return
    missing = [] if library else [_add(f"{MODEL}.external_lib", LIBRARY)]
    missing += [] if settings is not None else [_add(f"{SWITCH}.enable", True, plus=True)]
    message = "npu_fuse is off: ops are fused in the Qwen families that verl patches, and in no other model"
    yield Finding("verl.switch", "warning", message, " and ".join(missing))


def _typed(text: str) -> object:
    return {"true": True, "false": False, "null": None}.get(text.lower(), text)


def _fsdp(config: RunConfig) -> Iterator[Finding]:
    yield from _parameters(config)
    size, world = config.number(f"{ACTOR}.fsdp_config.fsdp_size", -1), _world(config)
    if size is not None and size > 0 and world is not None and world % size:
        message = f"fsdp_size {size} does not divide the {world} devices of the run"
        yield Finding("verl.fsdp_size", "error", message, "give a divisor, or -1 for all devices")
    else:
        given = "all devices" if size in (None, -1) else f"{size} of {world or 'the'} devices"
        yield Finding("verl.fsdp_size", "ok", f"parameters are sharded over {given}; npu_fuse works with any size")
    gathered = config.flag(f"{ACTOR}.fsdp_config.reshard_after_forward", True) is False
    billions = _billions(config)
    line = f"{ACTOR}.fsdp_config.reshard_after_forward"
    if billions is None:
        message = "the model's size is not in its path: below 7B the guide keeps parameters gathered (ZeRO-2)"
        yield Finding("verl.reshard", "info", message, "" if gathered else f"{_add(line, False)} for such a model")
    elif billions < SMALL_MODEL and not gathered:
        yield Finding("verl.reshard", "warning", f"a {billions:g}B model is resharded after forward", _add(line, False))
    elif billions >= SMALL_MODEL and gathered:
        message = f"a {billions:g}B model keeps all parameters gathered: memory may run out"
        yield Finding("verl.reshard", "warning", message, _add(line, True))
    else:
        yield Finding("verl.reshard", "ok", f"reshard_after_forward={not gathered} suits a {billions:g}B model")


def _parameters(config: RunConfig) -> Iterator[Finding]:
    """FSDP1 flattens parameters unless told otherwise, and then Dynamo cannot follow."""
    strategy = config.get(f"{ACTOR}.strategy", "fsdp")
    if strategy != "fsdp":
        yield Finding("verl.strategy", "ok", f"strategy {strategy}")
        return
    trained = [f"{ACTOR}.fsdp_config", f"{REF}.fsdp_config"]
    trained += [f"{CRITIC}.fsdp"] if config.under(CRITIC) else []
    flat = [key for key in trained if config.flag(f"{key}.use_orig_params", False) is not True]
    if flat:
        remedy = " ".join(_add(f"{key}.use_orig_params", True) for key in flat) + f", or {ACTOR}.strategy=fsdp2"
        message = "strategy fsdp without use_orig_params: npu_fuse refuses to start, its graphs would break up"
        yield Finding("verl.strategy", "error", message, remedy)
    else:
        yield Finding("verl.strategy", "ok", "strategy fsdp with use_orig_params")


def _world(config: RunConfig) -> int | None:
    per_node, nodes = config.number("trainer.n_gpus_per_node", 8), config.number("trainer.nnodes", 1)
    return None if per_node is None or nodes is None else per_node * nodes


def _billions(config: RunConfig) -> float | None:
    found = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)[Bb](?![A-Za-z0-9])", config.get(f"{MODEL}.path") or "")
    return float(found[1]) if found else None


# --- rollout and environment -------------------------------------------------------------------------


def _rollout_rows(config: RunConfig) -> Iterator[Finding]:
    if config.flag(f"{ROLLOUT}.enable_chunked_prefill", True) is False:
        line = f"set {ROLLOUT}.enable_chunked_prefill=True"
        yield Finding("verl.chunked_prefill", "warning", "chunked prefill is switched off", line)
    else:
        yield Finding("verl.chunked_prefill", "ok", "chunked prefill is on")
    if config.flag(f"{ROLLOUT}.enforce_eager", False):
        message = "the rollout runs eagerly: no graph, and no pass of npu_fuse or of vllm-ascend"
        yield Finding("verl.graph_mode", "warning", message, f"set {ROLLOUT}.enforce_eager=False")
        return
    yield Finding("verl.graph_mode", "ok", "the rollout runs in graph mode")
    capture = config.get(f"{COMPILATION}.cudagraph_mode", "FULL_AND_PIECEWISE")
    if capture in FULL:
        message = (
            f"with cudagraph_mode {capture} vllm-ascend runs no pass manager; npu_fuse fuses what is handed to"
            " npugraph_ex in its releases from 0.18.0 to 0.23.0 and warns at start in others"
        )
        remedy = f"where it warns, set {COMPILATION}.cudagraph_mode=FULL_AND_PIECEWISE"
        yield Finding("verl.capture", "info", message, remedy)
    named = any("npu_fuse" in v for v in config.under(f"{COMPILATION}.inductor_passes").values())
    if named or config.environment.get("NPU_FUSE_VLLM") == "1" or _rollout_switched_on(config):
        yield Finding("verl.rollout", "ok", "the rollout's graphs are fused by npu_fuse too")
    else:
        line = f"{_add(f'{SWITCH}.enable', True, plus=True)} (and no {SWITCH}.rollout=False), or export NPU_FUSE_VLLM=1"
        yield Finding("verl.rollout", "info", "the rollout's graphs are fused by vllm-ascend alone", line)
    if config.environment.get("VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE"):
        message = "VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE does nothing in vllm-ascend after 0.23"
        yield Finding("verl.mc2", "info", message, "drop it with a newer vllm-ascend")


def _rollout_switched_on(config: RunConfig) -> bool:
    """verl's server switches the pass on itself under the actor's switch."""
    on = config.flag(f"{SWITCH}.enable", False) and config.flag(f"{SWITCH}.rollout", True)
    return bool(on) and LIBRARY in (config.get(f"{MODEL}.external_lib") or "")


def _task_queue(config: RunConfig) -> Iterator[Finding]:
    level = config.environment.get("TASK_QUEUE_ENABLE", "1")
    rollout = config.environment.get("VLLM_ASCEND_TASK_QUEUE_ENABLE", level)
    graph_mode = not config.flag(f"{ROLLOUT}.enforce_eager", False)
    if graph_mode and rollout == "2":
        message = "TASK_QUEUE_ENABLE=2 excludes graph mode, and the rollout runs in graph mode"
        remedy = "export VLLM_ASCEND_TASK_QUEUE_ENABLE=1 (the rollout alone), or TASK_QUEUE_ENABLE=1 for both"
        yield Finding("verl.task_queue", "error", message, remedy)
    elif level == "2":
        yield Finding("verl.task_queue", "ok", f"task queue 2 in training, {rollout} in the rollout")
    else:
        remedy = "export TASK_QUEUE_ENABLE=2" + (" VLLM_ASCEND_TASK_QUEUE_ENABLE=1" if graph_mode else "")
        yield Finding("verl.task_queue", "info", f"the task queue is at level {level}; the guide takes 2", remedy)


def _collectives(config: RunConfig) -> Iterator[Finding]:
    mode = config.environment.get("HCCL_OP_EXPANSION_MODE")
    if mode is None:
        message = "HCCL_OP_EXPANSION_MODE is not set: the guide expands collectives on the vector cores"
        yield Finding("verl.hccl", "info", message, "export HCCL_OP_EXPANSION_MODE=AIV")
    elif mode not in ("AI_CPU", "AIV", "HOST", "HOST_TS"):
        yield Finding(
            "verl.hccl", "error", f"HCCL_OP_EXPANSION_MODE={mode} is no mode", "use AI_CPU, AIV, HOST or HOST_TS"
        )
    else:
        fused = config.get(f"{ROLLOUT}.expert_parallel_size", "1") not in ("1", None)
        if mode == "AIV" and fused and not config.flag(f"{ROLLOUT}.enforce_eager", False):
            message = "HCCL_OP_EXPANSION_MODE=AIV and captured MC2 ops of experts have been seen to deadlock"
            yield Finding("verl.hccl", "warning", message, "use AI_CPU if the rollout hangs while it captures")
        else:
            yield Finding("verl.hccl", "ok", f"HCCL_OP_EXPANSION_MODE={mode}")


# --- Megatron ----------------------------------------------------------------------------------------


def _megatron(config: RunConfig) -> Iterator[Finding]:
    message = "npu_fuse does not compile Megatron's layers: its own switches for fused ops have to be on"
    yield Finding("verl.megatron", "info", message)
    base = f"{ACTOR}.megatron"
    flags = dict(MEGATRON_FLAGS)
    experts = config.number(f"{base}.expert_model_parallel_size", 1) or 1
    moe = experts > 1 or any("moe" in key for key in config.values) or bool(_billions_active(config))
    flags |= MEGATRON_MOE_FLAGS if moe else {}
    for role in (ACTOR, REF):
        section = f"{role}.megatron.override_transformer_config"
        inherited = role == REF and not config.under(section)
        for flag, meaning in {} if inherited else flags.items():
            yield _flag_row(config, f"{section}.{flag}", flag, meaning)
    yield from _context_parallel(config, base)
    for key in ("sequence_parallel", "use_distributed_optimizer"):
        on = config.flag(f"{base}.{key}", True)
        level = "ok" if on else "warning"
        remedy = "" if on else f"set {base}.{key}=True"
        yield Finding(f"verl.{key}", level, f"{key} is {'on' if on else 'off'}", remedy)  # type: ignore[arg-type]
    etp = config.number(f"{base}.expert_tensor_parallel_size", 0)
    if experts > 1 and etp != 1:
        message = "experts are split over devices and, by default, each expert as well: narrow grouped matmuls"
        yield Finding("verl.etp", "warning", message, f"set {base}.expert_tensor_parallel_size=1")
    yield from _mc2(config, base)


def _billions_active(config: RunConfig) -> bool:
    return re.search(r"A\d+(\.\d+)?[Bb]", config.get(f"{MODEL}.path") or "") is not None


def _flag_row(config: RunConfig, key: str, flag: str, meaning: str) -> Finding:
    state = config.flag(key)
    role = key.split(".")[1]
    if state:
        return Finding(f"verl.{flag}", "ok", f"{role}: {flag} is on ({meaning})")
    level = "error" if flag == "use_flash_attn" and state is False else "warning"
    word = "off" if state is False else "not set"
    return Finding(f"verl.{flag}", level, f"{role}: {flag} is {word} ({meaning})", _add(key, True, plus=True))  # type: ignore[arg-type]


def _context_parallel(config: RunConfig, base: str) -> Iterator[Finding]:
    outer, inner = f"{base}.context_parallel_size", f"{base}.override_transformer_config.context_parallel_size"
    first, second = config.get(outer, "1"), config.get(inner, "1")
    if first != second:
        message = f"context parallelism is {first} for verl and {second} for MindSpeed: both have to be the same"
        size = max(first or "1", second or "1", key=lambda t: int(t) if t.isdigit() else 0)
        yield Finding("verl.context_parallel", "error", message, f"set {outer}={size} and +{inner}={size}")
    else:
        yield Finding("verl.context_parallel", "ok", f"context parallelism: {first}")


def _mc2(config: RunConfig, base: str) -> Iterator[Finding]:
    key = f"{base}.override_transformer_config.use_ascend_mc2"
    on, tensor = config.flag(key, False), config.number(f"{base}.tensor_model_parallel_size", 1) or 1
    if on and tensor == 1:
        yield Finding("verl.mc2", "warning", "use_ascend_mc2 without tensor parallelism has no collective to fuse",
                      f"drop {key}")  # fmt: skip
    elif on and config.flag(f"{base}.sequence_parallel", True) is False:
        yield Finding("verl.mc2", "error", "use_ascend_mc2 fuses sequence parallelism's collectives, which is off",
                      f"set {base}.sequence_parallel=True")  # fmt: skip
    elif tensor > 1 and not on:
        yield Finding("verl.mc2", "info", "matmuls and their collectives run apart", _add(key, True, plus=True))
