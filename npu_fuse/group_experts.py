"""`group_experts`: serve blocks of experts whose loops branch on data, by one call before compiling.

No graph holds such a loop. A block that holds experts is tried on a few inputs: its routing and its experts are
read off its own runs, a grouped form of them is written, and the form takes the place of the block's forward if
the two agree on probes. Parameters, names and the state dict stay as they are; `ungroup_experts` undoes it.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from npu_fuse.block_form import Form, propose
from npu_fuse.block_inputs import Example, Signature, make, with_weights, working
from npu_fuse.block_proof import BlockVerdict, prove_block
from npu_fuse.errors import OptionError
from npu_fuse.expert_holders import Holder, holders, likely
from npu_fuse.expert_params import alike
from npu_fuse.expert_report import BlockReport, ExpertsReport
from npu_fuse.passes.grouped_matmul import MAX_LIST
from npu_fuse.report import Status
from npu_fuse.untouched import model_untouched

logger = logging.getLogger("npu_fuse")
MARK = "_npu_fuse_ungrouped"
SIZES = ((2, 3), (5, 7))
"""Two sizes of input that no number of a block is likely to be a multiple of in both."""


def group_experts(model: nn.Module, *, numerics: str = "fused") -> ExpertsReport:
    """Give every block of experts in `model` a grouped forward, where one is found and proved. Reversible.

    The forward is replaced on the instances; modules, parameters, buffers and the state dict stay the same objects
    under the same names. A block takes its own forward again where it is called otherwise than it was proved: other
    arguments, dtypes, ranks or modes. The proof makes a float64 copy of one block at a time. numerics="exact" takes
    only forms that are bit-equal in the block's dtype on every probe (sums of experts in another order are not).
    Call it once more after changing dtype or structure. Pickling needs `ungroup_experts` first.

    Raises `OptionError` for another `numerics`.
    """
    if numerics not in ("fused", "exact"):
        raise OptionError(f"numerics is {numerics!r}", key="numerics", remedy="give 'fused' or 'exact'")
    ungroup_experts(model)
    known: dict[Any, BlockVerdict] = {}
    found: dict[str, BlockReport] = {}
    for holder in holders(model):
        served = [b.path for b in found.values() if b.status is Status.FUSED]
        if any(_within(holder.path, p) or _within(p, holder.path) for p in served):
            continue
        block = _serve(model, holder, numerics, known)
        if block is not None:
            found = {p: b for p, b in found.items() if not (block.status is Status.FUSED and _within(p, block.path))}
            found.setdefault(block.path, block)
    report = ExpertsReport(tuple(found.values()))
    logger.info("npu_fuse: %s", str(report).splitlines()[0])
    return report


def _within(path: str, outer: str) -> bool:
    return path == outer or not outer or path.startswith(outer + ".")


def ungroup_experts(model: nn.Module) -> int:
    """Give every block its own forward back; how many there were."""
    count = 0
    for module in model.modules():
        if MARK in module.__dict__:
            kept = module.__dict__.pop(MARK)
            module.__dict__.pop("forward", None)
            if kept is not None:
                module.__dict__["forward"] = kept
            count += 1
    return count


def _serve(model: nn.Module, holder: Holder, numerics: str, known: dict[Any, BlockVerdict]) -> BlockReport | None:
    """Try the blocks that may be the whole, innermost first; the first that is proved is served."""
    reasons: list[tuple[int, str, Status, str, int]] = []
    for path in holder.blocks:
        block = model.get_submodule(path)
        problem = _unfit(block)
        if problem:
            return BlockReport(path, Status.MISSED, problem, holder.experts)
        served = None
        with model_untouched(block, ()):
            for signature in working(block, holder.widths, holder.experts):
                result = _try(block, path, signature, numerics, known)
                if result.status is Status.FUSED:
                    served = signature, result
                    break
                reasons.append((result.telling, result.report.reason, result.status, path, signature.rank))
        if served is not None:
            signature, result = served
            _install(block, signature, result.forms)
            notes = _other_ranks(reasons, path, signature.rank)
            return replace(result.report, notes=(*result.report.notes, *notes))
    if not reasons and not likely(model, holder):
        return None
    if not reasons:
        reason = "its forward runs on no inputs that were tried"
        return BlockReport(_outermost(holder), Status.MISSED, reason, holder.experts)
    telling, reason, status, *_ = max(reasons, key=lambda r: r[0])
    return BlockReport(_outermost(holder), status, reason, holder.experts) if telling else None


def _other_ranks(reasons: list[tuple[int, str, Status, str, int]], path: str, rank: int) -> list[str]:
    return [f"given {r} dimensions, as it was: {why}" for _, why, _, p, r in reasons if p == path and r != rank][:1]


def _outermost(holder: Holder) -> str:
    """Where a block that was left is reported: two lists of experts in one block are one entry."""
    return holder.blocks[min(1, len(holder.blocks) - 1)]


def _unfit(block: nn.Module) -> str:
    parameters = list(block.parameters())
    if any(p.is_meta for p in parameters):
        return "its parameters are on the meta device: load the weights first"
    if len({p.device for p in parameters}) > 1:
        return "its parameters are on several devices"
    if any(type(p) is not nn.Parameter or not p.is_floating_point() for p in parameters):
        return "its parameters are no plain floating-point tensors"
    return ""


@dataclass
class _Tried:
    """One block with one signature. `telling`: how far it came, to choose the reason that says most."""

    report: BlockReport
    forms: dict[bool, tuple[Form, bool]]
    telling: int

    @property
    def status(self) -> Status:
        return self.report.status


def _try(block: nn.Module, path: str, signature: Signature, numerics: str, known: dict[Any, BlockVerdict]) -> _Tried:
    rest = _takes_no_expert(block, signature)
    forms: dict[bool, tuple[Form, bool]] = {}
    reasons: dict[bool, tuple[int, str, Status]] = {}
    facts = None
    never: set[int] = set()
    for training in (False, True):
        with _mode(block, training):
            examples = (make(signature, block, SIZES[0], 1), make(signature, block, SIZES[1], 2))
            try:
                form = propose(block, examples, signature.experts, rest)
            except Exception as fault:
                logger.debug("no form for %s", path, exc_info=True)
                form = f"{type(fault).__name__}: {fault}"
            if isinstance(form, str):
                reasons[training] = (_telling(form), form, Status.MISSED)
                continue
            limit = _limit(block, form)
            if limit:
                reasons[training] = (3, limit, Status.REFUSED_BY_TARGET)
                continue
            verdict = _verdict(block, form, signature, rest, numerics, training, known)
            facts = verdict.facts
            unseen = verdict.unseen if verdict.holds else ()
            if unseen and not _alike(block):
                why = f"no probe was routed to expert {unseen[0]}, and the experts' attributes are not all equal"
                reasons[training] = (4, why, Status.REFUSED_BY_PROOF)
            elif verdict.holds:
                forms[training] = form, verdict.autocast
                never |= set(unseen)
            else:
                reasons[training] = (4, verdict.reason, Status.REFUSED_BY_PROOF)
    if not forms:
        telling, reason, status = max(reasons.values(), key=lambda r: r[0])
        return _Tried(BlockReport(path, status, reason, proof=facts), {}, telling)
    modes = [("train" if mode else "eval") for mode in forms]
    modes += ["autocast"] if all(ok for _, ok in forms.values()) else []
    form = next(iter(forms.values()))[0]
    kept = [f"in {'training' if mode else 'inference'} as it was: {r[1]}" for mode, r in reasons.items()]
    notes = (*form.notes, *_not_seen(never), *kept)
    report = BlockReport(
        path, Status.FUSED, "", form.experts, form.k, tuple(modes), form.text, facts, notes
    )  # fmt: skip
    return _Tried(report, forms, 5)


def _not_seen(never: set[int]) -> list[str]:
    which = ", ".join(map(str, sorted(never)))
    return [f"no probe was routed to {which}: taken to compute what the other experts do"] if never else []


def _alike(block: nn.Module) -> bool:
    """Experts in a list have the same plain attributes: what differs is their parameters."""
    for _, container in block.named_modules():
        if isinstance(container, (nn.ModuleList, nn.ModuleDict)):
            for group in alike(list(container.named_children())).values():
                if len({_plain(child) for _, child in group}) > 1:
                    return False
    return True


def _telling(reason: str) -> int:
    return 0 if reason.startswith("no matmul") else 1 if reason.startswith("nothing in it") else 2


def _limit(block: nn.Module, form: Form) -> str:
    on_npu = next(block.parameters()).device.type == "npu"
    if on_npu and "grouped_linear(" in form.text and form.experts > MAX_LIST:
        return f"npu_grouped_matmul takes {MAX_LIST} weights in a list at most, here are {form.experts}"
    return ""


def _takes_no_expert(block: nn.Module, signature: Signature) -> bool:
    """Indices past the last expert (sentinels of expert parallelism) are taken and count for nothing."""
    if "indices" not in signature.kinds.values():
        return False
    example = make(signature, block, (2, 4), 3, 2, "rest")
    try:
        with torch.no_grad():
            block.forward(*example.args, **example.kwargs)
    except Exception:
        return False
    return True


def _verdict(block: nn.Module, form: Form, signature: Signature, rest: bool, numerics: str, training: bool,
             known: dict[Any, BlockVerdict]) -> BlockVerdict:  # fmt: skip
    """Of equal blocks one is proved: the same code, sizes and plain attributes."""
    key = (type(block), form.text, training, rest, numerics, _plain(block))
    if key not in known:
        verdict = prove_block(block, form.function, signature, rest, numerics)
        for dtype in {torch.float32, next(block.parameters()).dtype} if verdict.holds and _weighted(signature) else ():
            if dtype is not signature.weights:
                verdict = prove_block(block, form.function, with_weights(signature, dtype), rest, numerics)
        known[key] = verdict
    return known[key]


def _weighted(signature: Signature) -> bool:
    return "weights" in signature.kinds.values()


def _plain(block: nn.Module) -> tuple[Any, ...]:
    """Numbers, words and flags of the block's modules, and the sizes and dtypes of its tensors."""
    found: list[Any] = [(n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in block.named_parameters()]
    found += [(n, tuple(t.shape), t.dtype) for n, t in block.named_buffers()]
    for name, module in block.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, bool))}
        found.append((name, type(module), tuple(sorted(plain.items(), key=lambda i: i[0]))))
    return tuple(found)


@contextlib.contextmanager
def _mode(block: nn.Module, training: bool) -> Iterator[None]:
    kept = {m: m.training for m in block.modules()}
    block.train(training)
    try:
        yield
    finally:
        for module, flag in kept.items():
            module.training = flag


def _install(block: nn.Module, signature: Signature, forms: Mapping[bool, tuple[Form, bool]]) -> None:
    example = make(signature, block, SIZES[0], 1)
    kept = block.__dict__.get("forward")
    block.__dict__[MARK] = kept
    block.__dict__["forward"] = types.MethodType(_forward(block, example, forms), block)


def _forward(block: nn.Module, example: Example, forms: Mapping[bool, tuple[Form, bool]]) -> Callable[..., Any]:
    """The block's new forward: the grouped form where it was proved, the block's own everywhere else."""
    own = block.forward
    original = own.__func__ if isinstance(own, types.MethodType) and own.__self__ is block else type(block).forward
    defaults = {p.name: p.default for p in inspect.signature(own).parameters.values()}
    order = tuple(defaults)
    names, ranks = example.names, tuple(t.dim() for t in example.tensors)
    first = next(p for p in block.parameters() if p.is_floating_point()).dtype
    functions = {mode: form.function for mode, (form, _) in forms.items()}
    autocast = {mode: ok for mode, (_, ok) in forms.items()}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(order, args, strict=False)) | kwargs
        tensors = [given.pop(n, None) for n in names]
        fits = len(args) <= len(order) and self.training in functions
        for name, value in given.items():
            fits = fits and name in defaults and value is defaults[name]
        for value, rank, name in zip(tensors, ranks, names, strict=True):
            fits = fits and isinstance(value, torch.Tensor) and value.dim() == rank
            if fits and name == names[0]:
                fits = value.dtype is first and value.numel() > 0
            if fits and torch.is_autocast_enabled(value.device.type):
                fits = autocast[self.training]
        if not fits:
            return original(self, *args, **kwargs)
        return functions[self.training](self, *tensors)

    return forward
