"""What a user can ask for: `torch.compile(model, backend="npu_fuse", options={...})`.

`Options` is immutable, hashable and checked on construction, so that a wrong option is reported before
anything is compiled. Importing this module imports neither torch nor torch_npu.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from npu_fuse.errors import OptionError, TargetError
from npu_fuse.option_checks import (
    as_op_names,
    as_path,
    check,
    check_choice,
    check_combinations,
    check_handoff,
    nearest,
)

logger = logging.getLogger(__name__)

CACHE_DIR_VARIABLE = "NPU_FUSE_CACHE_DIR"

CHOICES: Mapping[str, tuple[str, ...]] = {
    "target": ("auto", "reference", "npu"),
    "numerics": ("fused", "exact"),
    "prove": ("once", "always", "shadow"),
    "shadow_action": ("raise", "log"),
    "moe_gating": ("inference", "always", "never"),
    "mc2_gather": ("graph", "keep", "again"),
}
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
FLAGS = ("strict", "frozen_weights")
PATHS = ("proof_cache", "report_dir", "dump", "shadow_dump")


class FrozenMapping(Mapping[str, Any]):
    """An immutable mapping that hashes by its keys: values (lists, configurations) need not be hashable."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items))

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True)
class Options:
    """How to fuse, what to prove, and whom to hand the graph to.

    Raises `OptionError` on construction for unknown values, wrong types and contradictions.
    """

    target: str = "auto"
    """"npu" emits torch_npu's ops, "reference" the same ops in plain torch; "auto" is "npu" where torch_npu
    is loaded and sees a device, else "reference"."""
    handoff: str | Callable[..., Any] | None = None
    """Who compiles the rewritten graph: the name of a torch.compile backend, a callable
    `fn(gm, example_inputs)`, or None for the default of the device and of inference or training."""
    handoff_options: Mapping[str, Any] = field(default_factory=FrozenMapping)
    """Options for the hand-off in `handoff`, which checks them itself; a callable gets them as keywords."""
    fuse: str | frozenset[str] = "all"
    """"all", or the names of the ops to fuse (any collection, or one string with commas)."""
    skip: frozenset[str] = frozenset()
    """Names of ops not to fuse; their sites are reported as skipped."""
    numerics: str = "fused"
    """"fused": the fused kernel's own rounding, proved no less accurate than the code it replaces.
    "exact": only rewrites that were bit-equal on every probe, which is a test and not a proof."""
    prove: str = "once"
    """"once": each distinct rewrite once per process, or taken from `proof_cache`. "always": never from a
    cache. "shadow": also run the original graph beside the rewritten one on the first calls."""
    shadow_calls: int = 8
    """With prove="shadow": the number of calls of each graph that are compared."""
    shadow_action: str = "raise"
    """With prove="shadow": "raise" `ShadowMismatch`, or "log" it and go on."""
    shadow_dump: str | None = None
    """With prove="shadow": a folder for the inputs of a call whose results differ."""
    strict: bool = False
    """Raise `StrictError` where a candidate site is left unfused."""
    soc: str | None = None
    """With target="npu": the chip to plan for, such as "Ascend910B3", instead of the one that is present."""
    glu_concat: Literal["target"] | bool = "target"
    """Whether gate and up from two projections may be concatenated for the fused gated MLP, at the price of
    reading and writing both halves once more (the report has the bytes). "target" leaves it to the target:
    npu concatenates by default, since its op takes one tensor only. Weights are never merged."""
    mc2_min_rows: int | None = None
    """Products of fewer rows (tokens) than this are not fused with the communication behind them: the fused
    kernels are slower for decode-sized inputs. None: 512 with target npu, none with target reference."""
    moe_gating: str = "inference"
    """Where routers of experts become one op: which of several tied experts it takes is its own choice, as it is
    torch.topk's. "inference": not where their weights carry a gradient; "always"; "never"."""
    mc2_gather: str = "graph"
    """Rows that are gathered for products, in training: "keep" the gathered value for the weights' gradients, gather
    it "again" in the backward (less memory, one more collective), or as the "graph" has it."""
    frozen_weights: bool = False
    """The user's word that weights never change after compiling, so that copies of them may be kept."""
    proof_cache: str | None = None
    """A folder that keeps proofs between processes; `Options.make` reads NPU_FUSE_CACHE_DIR where unset."""
    report_dir: str | None = None
    """A folder for the JSON report of every graph."""
    dump: str | None = None
    """A folder for readable graphs before and after each step."""
    mode: str | None = None
    """torch.compile's `mode`, passed on to the hand-off."""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if self.mode is not None:
            check_choice("mode", self.mode, MODES)
        for name in FLAGS:
            check(name, isinstance(getattr(self, name), bool), getattr(self, name), "True or False")
        for name in PATHS:
            self._store(name, as_path(name, getattr(self, name)))
        calls, soc, concat, given = self.shadow_calls, self.soc, self.glu_concat, self.handoff_options
        check("shadow_calls", type(calls) is int and calls > 0, calls, "a whole number above 0")
        check("soc", soc is None or (isinstance(soc, str) and soc), soc, "None or the name of a chip")
        check("glu_concat", concat == "target" or isinstance(concat, bool), concat, "'target', True or False")
        rows = self.mc2_min_rows
        check("mc2_min_rows", rows is None or (type(rows) is int and rows >= 0), rows, "None or a whole number")
        check_handoff(self.handoff)
        keyed = isinstance(given, Mapping) and all(isinstance(key, str) for key in given)
        check("handoff_options", keyed, given, "a dict whose keys are strings")
        self._store("handoff_options", FrozenMapping(given))
        self._store("fuse", self.fuse if self.fuse == "all" else as_op_names("fuse", self.fuse))
        self._store("skip", as_op_names("skip", self.skip))
        self._store("mode", None if self.mode == "default" else self.mode)
        check_combinations(self, {f.name: f.default for f in fields(self)})

    def _store(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the one way to normalise a field of a frozen dataclass

    @classmethod
    def make(cls, options: Mapping[str, Any] | Options | None = None, mode: str | None = None) -> Options:
        """Options from what torch.compile gives a backend: `options` and `mode`, either may be missing.

        Raises `OptionError`.
        """
        made = options if isinstance(options, Options) else cls._from_mapping(options)
        if mode is not None:
            if made.mode not in (None, mode):
                why = f"mode={mode!r} contradicts the option mode={made.mode!r}"
                raise OptionError(why, key="mode", remedy="give one of them")
            made = replace(made, mode=mode)
        cache_dir = os.environ.get(CACHE_DIR_VARIABLE)
        return replace(made, proof_cache=cache_dir) if cache_dir and made.proof_cache is None else made

    @classmethod
    def _from_mapping(cls, options: Mapping[str, Any] | None) -> Options:
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise OptionError(
                f"options are {options!r} ({type(options).__name__}); allowed: a dict or npu_fuse.Options",
                remedy='write options={"target": "reference"}, for example',
            )
        names = [f.name for f in fields(cls)]
        for key in options:
            if key not in names:
                raise OptionError(
                    f"unknown option {key!r}; allowed: {', '.join(names)}",
                    key=str(key),
                    remedy=nearest(key, names) or "use one of the names above",
                )
        return cls(**options)

    def fuses(self, op: str) -> bool:
        """Whether sites of this op are to be fused."""
        return op not in self.skip and (self.fuse == "all" or op in self.fuse)

    def cache_tag(self) -> str:
        """A short text that changes with everything that can change a rewritten graph.

        For `torch.compiler.config.cache_key_tag`. Raises `TargetError` as `resolve_target` does.
        """
        from npu_fuse.cache_tag import cache_tag

        return cache_tag(self, resolve_target(self))


def check_options(options: Mapping[str, Any]) -> Options:
    """Check a dict of options before anything is compiled. Raises `OptionError`."""
    return Options.make(options)


def resolve_target(options: Options) -> Literal["reference", "npu"]:
    """The target to use on this machine. Raises `TargetError` where "npu" was asked for and cannot be used.

    "auto" never imports torch_npu: where nothing has loaded it, there can be no tensor on an NPU.
    """
    if options.target == "npu":
        _import_torch_npu()
        return "npu"
    if options.target == "auto" and "torch_npu" in sys.modules:
        if npu_is_loaded():
            return "npu"
        logger.info("torch_npu is loaded but sees no device: the target is reference")
    return "reference"


def npu_is_loaded() -> bool:
    """Whether torch_npu is loaded and sees a device."""
    npu = getattr(sys.modules.get("torch"), "npu", None)
    return sys.modules.get("torch_npu") is not None and npu is not None and bool(npu.is_available())


def _import_torch_npu() -> None:
    try:
        import torch_npu  # noqa: F401
    except Exception as error:  # a wheel without its libraries raises OSError, ImportError or RuntimeError
        if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
            why = "is not installed"
            remedy = "install the torch_npu release for your torch (pip install torch-npu)"
        else:
            why = f"cannot be imported ({type(error).__name__}: {error})"
            remedy = "source CANN's set_env.sh and check that torch_npu's version is torch's"
        raise TargetError(
            f"target 'npu' needs torch_npu, which {why}", remedy=f"{remedy}, or use target='reference'"
        ) from error
