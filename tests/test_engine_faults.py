"""Faults inside npu_fuse, odd tensors, surroundings: the model runs as without npu_fuse, and the report says why."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rules import helpers
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import npu_fuse
from npu_fuse import backend, emit, proofs, prove
from npu_fuse.report import SiteReport, Status

OPTIONS = helpers.OPTIONS
WIDTH = 16


class Block(torch.nn.Module):
    """A norm and a gated MLP: two sites."""

    def __init__(self, eps: float = 1e-5, width: int = WIDTH) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.rand(width, generator=generator) + 0.5)
        self.up = torch.nn.Parameter(torch.randn(2 * width, width, generator=generator) / 4)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(self.norm(x), self.up).chunk(2, -1)
        return F.silu(gate) * up


@pytest.fixture(autouse=True)
def _fresh():
    proofs.forget_verdicts()
    with helpers.fresh():
        yield
    proofs.forget_verdicts()


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return helpers.random(shape or (2, 5, WIDTH), dtype, seed)


def compiled(model: Any, **settings: Any) -> Any:
    options = {**OPTIONS, **settings.pop("options", {})}
    return torch.compile(model, backend="npu_fuse", options=options, **settings)


def sites(op: str | None = None) -> list[SiteReport]:
    return helpers.sites(npu_fuse.reports(), op)


def statuses(op: str | None = None) -> list[Status]:
    return [site.status for site in sites(op)]


def same_training(model: Any, fast: Any, *inputs: Any) -> None:
    """Values and all gradients equal eager's."""
    results = []
    for called in (model, fast):
        given = [
            i.clone().requires_grad_() if isinstance(i, torch.Tensor) and i.is_floating_point() else i for i in inputs
        ]
        leaves = [i for i in given if isinstance(i, torch.Tensor) and i.requires_grad]
        leaves += list(model.parameters()) if isinstance(model, torch.nn.Module) else []
        y = called(*given)
        results.append((y, torch.autograd.grad(y.float().square().sum(), leaves)))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ faults inside


def test_a_rule_that_throws_loses_its_own_sites_only(monkeypatch):
    def throw(view):
        raise ZeroDivisionError("a rule's own mistake")

    rules = tuple(replace(r, recognise=throw) if r.name == "rms_norm" else r for r in backend.RULES)
    monkeypatch.setattr(backend, "RULES", rules)
    model = Block()
    same_training(model, compiled(model), values())
    fault = next(s for s in sites("rms_norm") if s.status is Status.ERROR)
    assert fault.code == "rule.fault" and "a rule's own mistake" in fault.reason
    assert statuses("swiglu") == [Status.FUSED]


def test_a_proof_that_throws_refuses_the_site(monkeypatch):
    def throw(*args, **kwargs):
        raise MemoryError("the proof's own mistake")

    monkeypatch.setattr(proofs, "prove", throw)
    model = Block()
    same_training(model, compiled(model), values())
    assert set(statuses()) == {Status.ERROR}
    assert {s.code for s in sites()} == {"proof.fault"} and "the proof's own mistake" in sites()[0].reason


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_lowering_that_throws_leaves_the_graph_as_it_was(monkeypatch, after):
    calls = []
    original = emit.GraphEmitter.call

    def throw(self, *args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            raise KeyError("the lowering's own mistake")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(emit.GraphEmitter, "call", throw)
    model = Block()
    same_training(model, compiled(model), values())
    faults = [s for s in sites() if s.status is Status.ERROR]
    assert faults and all(s.code == "lower.fault" and "own mistake" in s.reason for s in faults)


def test_a_view_that_throws_hands_the_graph_on(monkeypatch):
    def throw(graph):
        raise RecursionError("the view's own mistake")

    monkeypatch.setattr(backend, "view_of", throw)
    model = Block()
    same_training(model, compiled(model), values())
    assert "the view's own mistake" in npu_fuse.reports()[0].errors[0]


def test_a_handoff_that_throws_is_the_users_to_see():
    def handoff(gm, example_inputs):
        raise LookupError("the hand-off's own mistake")

    with pytest.raises(Exception, match="the hand-off's own mistake"):
        compiled(Block(), options={"handoff": handoff})(values())
    assert npu_fuse.reports() == []


def test_a_proof_over_its_limit_refuses_and_says_so():
    model = Block(width=WIDTH).norm
    huge = prove.MAX_ELEMENTS
    wide = torch.nn.Module()
    wide.weight = torch.nn.Parameter(torch.ones(huge))
    x = values(2, 2 * huge)

    def norm(t):
        h = t.float()
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)

    torch.testing.assert_close(compiled(norm)(x), norm(x))
    assert statuses("rms_norm") == [Status.REFUSED_BY_PROOF] and "limit" in sites()[0].reason
    assert model is not None


# ------------------------------------------------------------------------------------ odd tensors


def rms(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def rope(x: torch.Tensor) -> torch.Tensor:
    cos, sin = torch.full((WIDTH,), 0.6), torch.full((WIDTH,), 0.8)
    return x * cos + torch.cat((-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]), -1) * sin


FUNCTIONS = [rms, swiglu, rope]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "made",
    [
        pytest.param(lambda: values().to(torch.complex64), id="complex"),
        pytest.param(lambda: (values() * 4).to(torch.int64), id="integer"),
        pytest.param(lambda: values()[:0], id="empty"),
        pytest.param(lambda: values() > 0, id="boolean"),
        pytest.param(lambda: values(WIDTH), id="one row"),
        pytest.param(lambda: values(1, 1, WIDTH), id="single"),
        pytest.param(lambda: values().double(), id="float64"),
        pytest.param(lambda: values().expand(3, 2, 5, WIDTH), id="expanded"),
        pytest.param(lambda: values(WIDTH, 5, 2).transpose(0, 2), id="strided"),
    ],
)
def test_odd_inputs_give_what_eager_gives(function, made):
    x = made()
    try:
        expected = function(x)
    except Exception as error:
        with pytest.raises(Exception):  # noqa: B017 - Dynamo wraps eager's exceptions in several ways
            compiled(function)(x)
        assert isinstance(error, RuntimeError | TypeError)
        return
    got = compiled(function)(x)
    assert got.dtype == expected.dtype and got.shape == expected.shape and got.stride() == expected.stride()
    torch.testing.assert_close(got, expected)
    assert Status.ERROR not in statuses()
    if x.numel() == 0:
        assert Status.FUSED not in statuses()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_meta_tensors_run_and_the_report_says_that_they_hold_no_values(function):
    x = torch.empty(2, 5, WIDTH, device="meta")
    if function is rope:
        return  # its tables lie on the CPU: eager raises
    assert compiled(function)(x).shape == function(x).shape
    assert [s.code for s in sites()] == ["tensor.meta"]


def test_sparse_and_quantised_tensors_beside_a_site():
    table = values(5, 5).relu().to_sparse()
    quantised = torch.quantize_per_tensor(values(5, WIDTH), 0.1, 0, torch.qint8)

    def model(x, s, q):
        return rms(torch.sparse.mm(s, x) + q.dequantize())

    x = values(5, WIDTH)
    torch.testing.assert_close(compiled(model)(x, table, quantised), model(x, table, quantised))
    assert Status.ERROR not in statuses()


def test_nested_tensors_run():
    x = torch.nested.nested_tensor([values(3, WIDTH), values(5, WIDTH, seed=1)], layout=torch.jagged)

    def model(t):
        return F.silu(t) * t.sin()

    got, expected = compiled(model)(x), model(x)
    torch.testing.assert_close(got.values(), expected.values())
    assert Status.ERROR not in statuses()


def test_dtensors_run(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placement in (Shard(0), Replicate()):
            x = distribute_tensor(values(), mesh, [placement])
            got, expected = compiled(rms)(x), rms(x)
            assert got.placements == expected.placements
            torch.testing.assert_close(got.to_local(), expected.to_local())
            assert Status.ERROR not in statuses()
    finally:
        dist.destroy_process_group()


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
REGIONS = {
    "checkpoint": lambda x: checkpoint(BLOCK, x, use_reentrant=False),
    "reentrant checkpoint": lambda x: checkpoint(BLOCK, x, use_reentrant=True),
    "selective checkpoint": lambda x: checkpoint(BLOCK, x, use_reentrant=False, context_fn=selective),
    "cond": lambda x: torch.cond(x.sum() > 0, BLOCK, lambda t: BLOCK(t) * 2, (x,)),
    "autograd function": lambda x: BLOCK(Passed.apply(x)),
    "graph break": lambda x: BLOCK(torch._dynamo.graph_break() or BLOCK.norm(x)),
    "nested region": lambda x: torch.compiler.nested_compile_region(BLOCK.norm)(x) + BLOCK.norm(x),
    "loop": lambda x: sum(BLOCK(x * i) for i in range(3)),
}


@pytest.mark.parametrize("name", REGIONS)
def test_regions_train_as_eager_does_and_are_fused_inside(name):
    function = REGIONS[name]
    same_training(function, compiled(function), values())
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
