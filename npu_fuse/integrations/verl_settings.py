"""What a verl run gives npu_fuse under `fused_kernel_options.npu_fuse`, checked."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from npu_fuse.errors import OptionError
from npu_fuse.option_checks import check, check_choice
from npu_fuse.options import Options

SECTION = "npu_fuse"
PREFIX = "actor_rollout_ref.model.fused_kernel_options.npu_fuse"
PATCHES = ("off", "keep")


@dataclass(frozen=True)
class Settings:
    """What stands under `fused_kernel_options.npu_fuse`, checked."""

    options: Options
    verl_patches: str = "off"
    rollout: bool = True
    """Whether the vLLM rollout gets the pass too."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """npu_fuse's options as they were written."""


def settings_of(fused_kernel_options: Any) -> Settings | None:
    """The settings in a model's `fused_kernel_options`, None where npu_fuse is not enabled. Raises `OptionError`."""
    section = plain(fused_kernel_options).get(SECTION)
    if section is None:
        return None
    given = plain(section)
    if not given and section != {}:
        raise OptionError(f"{PREFIX} is {section!r}", remedy=f"write +{PREFIX}.enable=True")
    enable, patches = given.pop("enable", False), given.pop("verl_patches", "off")
    rollout = given.pop("rollout", True)
    check("rollout", isinstance(rollout, bool), rollout, "True or False")
    check("enable", isinstance(enable, bool), enable, "True or False")
    check_choice("verl_patches", patches, PATCHES)
    try:
        options = Options.make(given)
    except OptionError as error:
        raise OptionError(f"{PREFIX}: {error.args[0]}", key=error.key, remedy=error.remedy) from error
    return Settings(options, patches, rollout, given) if enable else None


def plain(section: Any) -> dict[str, Any]:
    """A dict of a dict or of OmegaConf's."""
    if isinstance(section, Mapping):
        return {str(key): plain(value) if isinstance(value, Mapping) else value for key, value in section.items()}
    return {}


def be_heard() -> None:
    """verl's processes print warnings only, its vLLM servers errors only: let npu_fuse's lines be seen in all of them.

    A level that was set for the logger stays.
    """
    logger = logging.getLogger("npu_fuse")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not any(h.level <= logging.INFO for h in (*logger.handlers, *logging.getLogger().handlers)):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s:%(asctime)s:%(message)s"))
        logger.addHandler(handler)
