"""The checks behind `Options`: each names the option, what is allowed and the nearest right spelling."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NoReturn

from npu_fuse.chip_names import EXAMPLES, family
from npu_fuse.errors import OptionError

if TYPE_CHECKING:
    from npu_fuse.options import Options

OWN_NAME = "npu_fuse"

# Registered by torch_npu: as entry points from 2.13 on, before that only once torch_npu is imported.
NPU_BACKENDS = ("npu", "npugraph_ex", "npugraphs")

# These swallow `mode` without a word (torch's own through **kwargs, torch_npu's likewise): refused here.
TAKES_NO_MODE = frozenset(
    "eager eager_debug eager_noexcept pre_dispatch_eager aot_eager aot_eager_decomp_partition"
    " aot_eager_default_partitioner aot_ts ts cudagraphs npu npugraph_ex npugraphs".split()
)
TAKES_NO_OPTIONS = TAKES_NO_MODE - {"npu", "npugraph_ex"}


def known_ops() -> tuple[str, ...]:
    """The names of the fused ops, in the order in which their rules are tried."""
    from npu_fuse import passes

    return tuple(str(getattr(rule, "name", rule)) for rule in passes.RULES)


def nearest(value: object, allowed: Iterable[str]) -> str:
    """ "did you mean 'x'?" or an empty text."""
    close = difflib.get_close_matches(str(value).lower(), list(allowed), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def check(key: str, good: object, value: object, allowed: str, remedy: str = "") -> None:
    """Raise `OptionError` about `key` unless `good`."""
    if not good:
        raise OptionError(
            f"option {key!r} is {value!r} ({type(value).__name__}); allowed: {allowed}",
            key=key,
            remedy=remedy or f"set {key!r} to {allowed}",
        )


def check_choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    listed = ", ".join(map(repr, allowed))
    check(key, isinstance(value, str) and value in allowed, value, listed, nearest(value, allowed))


def as_path(key: str, value: object) -> str | None:
    """An absolute path: a later change of the working directory must not move a cache or a report."""
    if value is None:
        return None
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    check(key, isinstance(path, str) and path, value, "None or the path of a folder")
    return os.path.abspath(os.path.expanduser(str(path)))


def as_op_names(key: str, value: object) -> frozenset[str]:
    """Names of ops from any collection, or from one string with commas as a shell gives it."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    listable = isinstance(value, Iterable) and not isinstance(value, Mapping)
    names = list(value) if isinstance(value, Iterable) and listable else []
    what = ("'all' or " if key == "fuse" else "") + "names of ops, as a collection or one string with commas"
    check(key, listable and all(isinstance(name, str) for name in names), value, what)
    for name in names:
        ops = known_ops()
        check(key, name in ops, name, ", ".join(ops) or "none, no rule is installed", nearest(name, ops))
    return frozenset(names)


def check_handoff(handoff: object) -> None:
    """A name must be known to torch.compile, and must not be npu_fuse itself."""
    if handoff is None:
        return
    what = "None, the name of a torch.compile backend, or a callable fn(gm, example_inputs)"
    check("handoff", isinstance(handoff, str) or callable(handoff), handoff, what)
    if handoff == OWN_NAME or getattr(handoff, "__module__", None) == f"{OWN_NAME}.backend":
        raise OptionError(
            "option 'handoff' is npu_fuse itself: the graph would be handed back for ever",
            key="handoff",
            remedy="name the backend that compiles the rewritten graph, such as 'inductor'",
        )
    if isinstance(handoff, str) and handoff not in NPU_BACKENDS:
        import torch

        every = torch.compiler.list_backends(exclude_tags=())
        usual = [name for name in every if name != OWN_NAME and "TESTING" not in name and "minifier" not in name]
        remedy = nearest(handoff, usual) or "import the package that registers this backend first"
        check("handoff", handoff in every, handoff, f"None, a callable, {', '.join(usual)}, …", remedy)


def check_combinations(options: Options, defaults: Mapping[str, object]) -> None:
    """Refuse options that contradict each other, and those that would silently do nothing."""
    handoff = options.handoff
    both = [] if isinstance(options.fuse, str) else sorted(options.fuse & options.skip)
    if both:
        _refuse("skip", f"{', '.join(both)} stands in 'fuse' too", "name each op in one of the two")
    if options.soc is not None and options.target != "npu":
        why = f"a chip is planned for with target 'npu', and target is {options.target!r}"
        _refuse("soc", why, "add target='npu', or drop soc")
    if options.soc is not None and family(options.soc) is None:
        _refuse("soc", f"no chip is called {options.soc!r}", f"write one such as {', '.join(EXAMPLES)}")
    if options.handoff_options:
        if handoff is None:
            _refuse("handoff_options", "no hand-off is named to give them to", "name it in 'handoff'")
        if isinstance(handoff, str) and handoff in TAKES_NO_OPTIONS:
            why = f"the hand-off {handoff!r} ignores options"
            _refuse("handoff_options", why, "drop them, or hand off to 'inductor'")
    if options.mode is not None and handoff is not None:
        if not isinstance(handoff, str):
            why = f"a callable hand-off is called as fn(gm, example_inputs), without mode={options.mode!r}"
            _refuse("mode", why, "drop mode, and set it up inside the callable")
        check_mode(handoff, options.mode)
    if options.prove != "shadow":
        for key in ("shadow_calls", "shadow_action", "shadow_dump"):
            if getattr(options, key) != defaults[key]:
                why = f"it acts with prove='shadow' only, and prove is {options.prove!r}"
                _refuse(key, why, f"add prove='shadow', or drop {key}")


def check_mode(handoff: str, mode: str | None) -> None:
    """Refuse a mode that the hand-off of this name would ignore; for a default hand-off once it is known."""
    if mode is not None and handoff in TAKES_NO_MODE:
        why = f"the hand-off {handoff!r} ignores mode={mode!r}"
        _refuse("mode", why, "drop mode, or set the option handoff='inductor'")


def _refuse(key: str, why: str, remedy: str) -> NoReturn:
    raise OptionError(f"option {key!r}: {why}", key=key, remedy=remedy)
