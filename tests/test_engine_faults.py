"""Faults inside npu_fuse and odd tensors: the model runs as without npu_fuse, and the report says why."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rules import helpers
from rules.blocks import WIDTH, Block, compiled, rms, same_training, sites, statuses, values

import npu_fuse
from npu_fuse import emit_graph, proofs, prove
from npu_fuse.report import Status

backend: Any = importlib.import_module("npu_fuse.backend")
"""The module: npu_fuse.backend by attribute is the function in it."""


@pytest.fixture(autouse=True)
def _fresh():
    proofs.forget_verdicts()
    with helpers.fresh():
        yield
    proofs.forget_verdicts()


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
    original = emit_graph.GraphEmitter.call

    def throw(self, *args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            raise KeyError("the lowering's own mistake")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(emit_graph.GraphEmitter, "call", throw)
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
    x = values(2, 2 * prove.MAX_ELEMENTS)

    def norm(t):
        h = t.float()
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)

    torch.testing.assert_close(compiled(norm)(x), norm(x))
    assert statuses("rms_norm") == [Status.REFUSED_BY_PROOF] and "limit" in sites()[0].reason


# ------------------------------------------------------------------------------------ odd tensors


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
