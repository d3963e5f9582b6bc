"""A transformers architecture with random weights, small enough to be built and captured in seconds.

`build` takes a model type ("llama"), a class name ("LlamaForCausalLM"), a folder or a config.json. It never
goes to the network. Where no small configuration works, it says so and asks for a config.json, which
`full=True` takes as it is.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from npu_fuse.errors import NpuFuseError
from npu_fuse.small_config import attempts, set_depth

BATCH, SEQUENCE = 2, 16
MOST_PARAMETERS = 400_000_000
"""A reduced model with more is not tried: it would take longer to fill with random numbers than to read."""


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
        config = _config_of(cls, config)
        if not full:
            return _first_that_runs(cls, attempts(config, layers), dtype, seed)
        if layers:
            set_depth(config, layers)
        return _build(cls, config, dtype, seed)
    except ArchitectureError:
        raise
    except Exception as error:
        size = "at full size" if full else "small"
        raise ArchitectureError(
            f"cannot build {target!r} {size}: {type(error).__name__}: {str(error).strip()}",
            remedy=_remedy(error, full),
        ) from error
    finally:
        transformers.logging.set_verbosity(quiet)


def _remedy(error: Exception, full: bool) -> str:
    if isinstance(error, ImportError):
        return "install what is missing; or give package.module:callable that returns (model, inputs)"
    if full:
        return "give a config.json that transformers accepts, or package.module:callable"
    return (
        "write a config.json with small sizes that fit together and give it with --full; "
        "or give package.module:callable that returns (model, inputs)"
    )


# ----------------------------------------------------------------------------------------- which architecture


def _find(transformers: Any, target: str) -> tuple[Any, Any]:
    """The model class and its configuration, at the configuration's own sizes."""
    if os.path.exists(target):
        config = transformers.AutoConfig.from_pretrained(target, local_files_only=True)
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        return next(filter(None, named), None) or _class_for(transformers, config), config
    cls = getattr(transformers, target, None)
    if inspect.isclass(cls) and hasattr(cls, "config_class") and issubclass(cls, transformers.PreTrainedModel):
        return cls, cls.config_class()
    if target in transformers.CONFIG_MAPPING:
        config = transformers.CONFIG_MAPPING[target]()
        return _class_for(transformers, config), config
    raise ArchitectureError(f"no architecture is called {target!r}", remedy=_nearest(transformers, target))


def _class_for(transformers: Any, config: Any) -> Any:
    """The most useful class for a configuration: with a language head where there is one."""
    model_type, encoder_decoder = config.model_type, getattr(config, "is_encoder_decoder", False)
    auto = transformers.models.auto.modeling_auto
    tasks = ["FOR_CAUSAL_LM", "FOR_IMAGE_TEXT_TO_TEXT", "FOR_SEQ_TO_SEQ_CAUSAL_LM", "FOR_SPEECH_SEQ_2_SEQ"]
    if encoder_decoder:
        tasks.reverse()
    for task in (*tasks, "FOR_MASKED_LM", ""):
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


def _config_of(cls: Any, config: Any) -> Any:
    """The part of a multimodal configuration that `cls` is made from: all of it, or its text part."""
    wanted = getattr(cls, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return next((part for part in parts if isinstance(part, wanted)), config)


def _first_that_runs(
    cls: Any, makers: Iterable[Callable[[], Any]], dtype: torch.dtype, seed: int
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Raises what the first, smallest attempt raised if none runs."""
    first: Exception | None = None
    for make_config in makers:
        try:
            config = make_config()
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in cls(config).parameters())
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size} parameters, more than {MOST_PARAMETERS}")
            model, inputs = _build(cls, config, dtype, seed)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                model(**inputs)
        except Exception as error:
            first = first or error
        else:
            return model, inputs
    assert first is not None
    raise first


def _build(cls: Any, config: Any, dtype: torch.dtype, seed: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    if hasattr(config, "use_cache"):
        config.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).to(dtype).eval()
        return model, _inputs(model, config, dtype)


def _inputs(model: Any, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Token ids where the model takes them, else its main input (images, sound); and what it requires."""
    takes = inspect.signature(model.forward).parameters
    required = {name for name, p in takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    main = "input_ids" if "input_ids" in takes else getattr(model, "main_input_name", "input_ids")
    wanted = {main, *required}
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        wanted.add("decoder_input_ids")
    tensors = {name: _input(name, config, dtype) for name in sorted(wanted)}
    made: dict[str, Any] = {name: value for name, value in tensors.items() if value is not None}
    if not made:
        raise ArchitectureError(
            f"{type(model).__name__} takes {', '.join(sorted(wanted))}, for which no input is made here",
            remedy="give package.module:callable that returns (model, inputs)",
        )
    if "use_cache" in takes:
        made["use_cache"] = False
    return made


def _input(name: str, config: Any, dtype: torch.dtype) -> torch.Tensor | None:
    """Random values for an argument of `forward`, by its name; None where the name says nothing."""
    part = getattr(config, "vision_config", None) or getattr(config, "audio_config", None) or config
    if name.endswith("input_ids"):
        return torch.randint(3, 38, (BATCH, SEQUENCE))
    if name == "pixel_values":
        size = getattr(part, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        return torch.randn(BATCH, getattr(part, "num_channels", 3), height, width, dtype=dtype)
    if name == "input_features":
        frames = 2 * getattr(part, "max_source_positions", 64)
        return torch.randn(BATCH, getattr(part, "num_mel_bins", 80), frames, dtype=dtype)
    if name == "input_values":
        return torch.randn(BATCH, 4000, dtype=dtype)
    return None
