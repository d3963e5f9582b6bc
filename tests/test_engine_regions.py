"""What stands around a compiled call or inside it: modes, regions, threads, checkpoints, transforms."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from rules import helpers
from rules.blocks import WIDTH, Block, compiled, rms, same_training, sites, statuses, values
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from npu_fuse import proofs
from npu_fuse.report import Status


@pytest.fixture(autouse=True)
def _fresh():
    proofs.forget_verdicts()
    with helpers.fresh():
        yield
    proofs.forget_verdicts()


# ------------------------------------------------------------------------------------ surroundings


def test_nothing_global_changes():
    torch.manual_seed(5)
    model, x = Block().double(), values(dtype=torch.float64)
    settings = {
        "rng": torch.get_rng_state, "dtype": torch.get_default_dtype, "grad": torch.is_grad_enabled,
        "autocast": lambda: (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "threads": torch.get_num_threads, "deterministic": torch.are_deterministic_algorithms_enabled,
        "tag": lambda: torch.compiler.config.cache_key_tag, "inference": torch.is_inference_mode_enabled,
        "filters": lambda: list(warnings.filters), "matmul": torch.get_float32_matmul_precision,
        "anomaly": torch.is_anomaly_enabled, "device": torch.get_default_device,
    }  # fmt: skip
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            before = {name: read() for name, read in settings.items()}
            compiled(model)(x)
            after = {name: read() for name, read in settings.items()}
    finally:
        torch.set_default_dtype(torch.float32)
    assert Status.FUSED in statuses()
    assert torch.equal(before.pop("rng"), after.pop("rng"))
    assert before == after


def test_several_threads_compile_at_once():
    models = [Block(eps) for eps in (1e-6, 1e-5, 1e-4, 1e-3)]
    inputs = [values(2, 3 + i, WIDTH, seed=i) for i in range(len(models))]
    expected = [model(x) for model, x in zip(models, inputs, strict=True)]
    got: dict[int, Any] = {}
    ready = threading.Barrier(len(models))

    def work(i: int) -> None:
        fast = compiled(models[i])
        ready.wait()
        got[i] = fast(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, value in enumerate(expected):
        torch.testing.assert_close(got[i], value)
    assert statuses("rms_norm").count(Status.FUSED) >= 1 and Status.ERROR not in statuses()


def test_models_of_unlike_epsilon_under_dynamic_shapes():
    models = [Block(eps) for eps in (1e-6, 1e-1, 1e-3)]
    for i, model in enumerate(models):
        fast = compiled(model, dynamic=True)
        for rows in (3, 7):
            x = values(2, rows, WIDTH, seed=i) * 0.1
            same_training(model, fast, x)
    assert set(statuses("rms_norm")) == {Status.FUSED}
    assert {s.params["epsilon"] for s in sites("rms_norm")} >= {"1e-06", "0.1", "0.001"}


@pytest.mark.parametrize("change", ["eps", "weight"])
def test_an_attribute_that_changes_is_seen(change):
    model, x = Block(), values() * 0.01
    fast = compiled(model)
    torch.testing.assert_close(fast(x), model(x))
    if change == "eps":
        model.eps = 0.5
    else:
        model.weight.data.mul_(3)
    torch.testing.assert_close(fast(x), model(x))


# ------------------------------------------------------------------------------------ regions


def selective(*args: Any) -> Any:
    def policy(context: Any, op: Any, *rest: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if "mm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Passed(torch.autograd.Function):
    """x, with a gradient that is doubled."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


BLOCK = Block()
"""Regions read its parameters: their gradients are compared too."""


@torch.compiler.nested_compile_region
def nested(x: torch.Tensor) -> torch.Tensor:
    return BLOCK.norm(x)


REGIONS = {
    "checkpoint": lambda x: checkpoint(BLOCK, x, use_reentrant=False),
    "reentrant checkpoint": lambda x: checkpoint(BLOCK, x, use_reentrant=True),
    "selective checkpoint": lambda x: checkpoint(BLOCK, x, use_reentrant=False, context_fn=selective),
    "cond": lambda x: torch.cond(x.sum() > 0, BLOCK, lambda t: BLOCK(t) * 2, (x,)),
    "autograd function": lambda x: BLOCK(Passed.apply(x)),
    "graph break": lambda x: BLOCK(torch._dynamo.graph_break() or BLOCK.norm(x)),
    "nested region": lambda x: nested(x) + nested(x * 2) + BLOCK(x),
    "loop": lambda x: sum(BLOCK(x * i) for i in range(3)),
}


@pytest.mark.parametrize("name", REGIONS)
def test_regions_train_as_eager_does_and_are_fused_inside(name):
    function = REGIONS[name]
    same_training(function, compiled(function), values(), parameters=BLOCK.parameters())
    assert Status.FUSED in statuses("rms_norm") and Status.ERROR not in statuses()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda c: c.__name__)
def test_modes_around_the_call(context):
    model = Block()
    fast = compiled(model)
    with context():
        torch.testing.assert_close(fast(values()), model(values()))
    assert statuses("rms_norm")[0] is Status.FUSED


@pytest.mark.parametrize("where", ["around", "inside"])
def test_autocast(where):
    model = Block()

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    called = inside if where == "inside" else model
    fast = compiled(called)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        expected, got = called(values()), fast(values())
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    assert Status.ERROR not in statuses()


def test_vmap_and_functional_gradients():
    def batched(x):
        return torch.vmap(rms)(x)

    def slope(x):
        return torch.func.grad(lambda t: rms(t).sin().sum())(x)

    for function in (batched, slope):
        torch.testing.assert_close(compiled(function)(values()), function(values()), rtol=1e-4, atol=1e-5)
    assert Status.FUSED not in statuses() and {s.code for s in sites("rms_norm")} == {"scope.functorch"}


def test_proofs_keep_out_of_the_hooks_of_a_checkpointed_region():
    """Compiled when it is first called, which is inside: the proof saves tensors for its own gradients."""
    seen = []
    model, x = Block(), values().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.dtype) or t, lambda t: t):
        compiled(model)(x)
    assert seen and torch.float64 not in seen  # what is lifted is the proof's
