"""A transformers architecture with random weights, small enough to be built and captured in seconds.

`build` takes a model type ("llama"), a class name ("LlamaForCausalLM"), a folder or a config.json. It never
goes to the network. The reducer knows kinds of configuration fields (widths, depths, counts of heads and
experts), not models: where a model wants a relation between its fields that the reducer breaks, it says so
and asks for a config.json, which `full=True` takes as it is.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import os
import re
from collections.abc import Mapping
from typing import Any

import torch

from npu_fuse.errors import NpuFuseError

BATCH, SEQUENCE, VOCABULARY = 2, 16, 128
_WIDTH, _HEADS, _HEAD_DIM, _LAYERS = 64, 4, 16, 2
_MOST_KINDS_OF_LAYERS = 6

class ArchitectureError(NpuFuseError):
    """The architecture is unknown, or cannot be built or fed."""


def build(
    target: str,
    *,
    full: bool = False,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model with random weights, in eval mode, and inputs for it (batch 2, 16 tokens).

    `full` keeps the configuration's own sizes, else it is reduced. `layers` sets the depth in either case.
    Raises `ArchitectureError`.
    """
    try:
        import transformers
    except ImportError as error:
        raise ArchitectureError(
            "architectures are built with transformers, which is not installed",
            remedy="pip install 'npu-fuse[transformers]', or give package.module:callable",
        ) from error
    quiet = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        cls, config = _find(transformers, target)
        return _build(cls, config if full else _reduced(config, layers), full, layers, dtype, seed)
    except ArchitectureError:
        raise
    except Exception as error:
        remedy = (
            "give a config.json that transformers accepts"
            if full
            else "write a config.json with small sizes that fit together, and give it with --full"
        )
        raise ArchitectureError(
            f"cannot build {target!r} {'at full size' if full else 'small'}: {type(error).__name__}: {error}",
            remedy=remedy + "; or give package.module:callable",
        ) from error
    finally:
        transformers.logging.set_verbosity(quiet)


# ----------------------------------------------------------------------------------------- which architecture


def _find(transformers: Any, target: str) -> tuple[Any, Any]:
    """The model class and its configuration, at the configuration's own sizes."""
    if os.path.exists(target):
        config = transformers.AutoConfig.from_pretrained(target, local_files_only=True)
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        return next(filter(None, named), None) or _class_for(transformers, config.model_type), config
    cls = getattr(transformers, target, None)
    if (
        inspect.isclass(cls)
        and hasattr(cls, "config_class")
        and issubclass(cls, transformers.PreTrainedModel)
    ):
        return cls, cls.config_class()
    if target in transformers.CONFIG_MAPPING:
        return _class_for(transformers, target), transformers.CONFIG_MAPPING[target]()
    raise ArchitectureError(f"no architecture is called {target!r}", remedy=_nearest(transformers, target))


def _class_for(transformers: Any, model_type: str) -> Any:
    """The most useful class of a model type: with a language head where there is one."""
    auto = transformers.models.auto.modeling_auto
    for task in ("FOR_CAUSAL_LM", "FOR_IMAGE_TEXT_TO_TEXT", "FOR_SEQ_TO_SEQ_CAUSAL_LM", "FOR_MASKED_LM", ""):
        names = getattr(auto, f"MODEL_{task}_MAPPING_NAMES".replace("__", "_")).get(model_type)
        for name in (names,) if isinstance(names, str) else names or ():
            if hasattr(transformers, name):
                return getattr(transformers, name)
    raise ArchitectureError(
        f"transformers {transformers.__version__} has a configuration {model_type!r} and no model for it",
        remedy="name a class, such as LlamaForCausalLM",
    )


def _nearest(transformers: Any, target: str) -> str:
    looks_like_path = os.sep in target or target.endswith(".json")
    if looks_like_path:
        return f"there is no file or folder {os.path.abspath(target)}; nothing is downloaded"
    auto = transformers.models.auto.modeling_auto
    names = {name: name for name in transformers.CONFIG_MAPPING}
    for mapping in (auto.MODEL_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        for cls in mapping.values():
            names.update({c: c for c in ((cls,) if isinstance(cls, str) else cls)})
    folded = {name.lower(): name for name in names}
    close = [folded[c] for c in difflib.get_close_matches(target.lower(), folded, n=4, cutoff=0.6)]
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return hint + "Give a model type or class of transformers, a config.json, or package.module:callable"


# ------------------------------------------------------------------------------------------- model and inputs


def _build(
    cls: Any, config: Any, full: bool, layers: int | None, dtype: torch.dtype, seed: int
) -> tuple[torch.nn.Module, dict[str, Any]]:
    wanted = getattr(cls, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):  # a text model of a multimodal configuration
        subs = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
        config = next((sub for sub in subs if isinstance(sub, wanted)), config)
    if full and layers:
        for name in _DEPTHS + _ENCODER_DECODER_DEPTHS:
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, layers)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).to(dtype).eval()
        return model, _inputs(model, config, dtype)


def _inputs(model: Any, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Token ids, or what the model's main input is; and the decoder's tokens where it has a decoder."""
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    tokens = torch.randint(3, 38, (BATCH, SEQUENCE))
    made: dict[str, Any] = {}
    if main == "pixel_values":
        size = getattr(config, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        made[main] = torch.randn(BATCH, getattr(config, "num_channels", 3), height, width, dtype=dtype)
    elif main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 64)
        made[main] = torch.randn(BATCH, getattr(config, "num_mel_bins", 80), frames, dtype=dtype)
    elif main == "input_values":
        made[main] = torch.randn(BATCH, 4000, dtype=dtype)
    elif main in ("input_ids", "inputs_embeds") or "input_ids" in takes:
        made["input_ids"] = tokens
    else:
        raise ArchitectureError(
            f"{type(model).__name__} takes {main!r}, for which no input is made here",
            remedy="give package.module:callable that returns (model, inputs)",
        )
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = tokens.clone()
    if "use_cache" in takes:
        made["use_cache"] = False
    return made
