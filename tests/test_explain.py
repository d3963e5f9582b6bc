"""`explain` on small models: what it finds, where it points, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import json
import logging
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from npu_fuse.errors import CaptureError, OptionError, TargetError
from npu_fuse.explain import ExplainReport, explain
from npu_fuse.report import SiteReport, Status

WIDTH = 64


class Norm(nn.Module):
    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.pow(2).mean(self.dim, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean + 1e-6))  # the line of the norm


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * scale


class Broken(nn.Module):
    """Two graphs: print is not traced."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        self.say()  # the line of the break
        return self.norm(x + 1)

    def say(self) -> None:
        torch._dynamo.graph_break()


def inputs() -> torch.Tensor:
    return torch.randn(2, 8, WIDTH)


def sites(report: ExplainReport, op: str | None = None) -> list[SiteReport]:
    return [s for g in report.graphs for s in g.sites if op in (None, s.op)]


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith(text))
    return number


# ---------------------------------------------------------------------------------------------- what it finds


@pytest.mark.parametrize("train", [False, True])
def test_every_layer_is_found_with_its_place(train: bool) -> None:
    report = explain(Model(), inputs(), train=train)
    assert (report.subject, report.training) == ("Model", train)
    assert [g.training for g in report.graphs] == [train]
    norms = [s for s in sites(report) if s.op in ("rms_norm", "add_rms_norm")]
    assert [s.status for s in norms] == [Status.FUSED] * 3
    assert sorted(str(s.module) for s in norms) == [f"layers.{i}.norm" for i in range(3)]
    assert {(s.file, s.line, s.function) for s in norms} == {(__file__, line_of("# the line of the norm"), "forward")}
    assert {s.status for s in sites(report, "swiglu")} == {Status.FUSED}
    assert len(sites(report, "swiglu")) == 3
    assert all((s.before.bytes_saved > 0) is train for s in norms)
    assert report.breaks == report.failures == ()


def test_a_look_alike_is_reported_with_a_reason() -> None:
    report = explain(Norm(dim=-2), inputs())
    (site,) = sites(report, "rms_norm")
    assert site.status is Status.MISSED
    assert site.reason and site.code and site.line == line_of("# the line of the norm")


def test_plain_callables_and_keyword_inputs() -> None:
    model = Model(1)
    assert len(sites(explain(lambda x, y: model(x) + model(y), inputs(), y=inputs()), "rms_norm")) == 2
    assert len(sites(explain(model, x=inputs(), scale=2.0), "rms_norm")) == 1


def test_dynamic_sizes() -> None:
    report = explain(nn.Sequential(nn.Linear(WIDTH, WIDTH), Model(1)), inputs(), dynamic=True)
    assert [g.dynamic for g in report.graphs] == [True]
    assert len(sites(report)) == 2
    assert {s.status for s in sites(report)} == {Status.FUSED}


def test_options_are_obeyed_and_checked() -> None:
    report = explain(Model(1), inputs(), options={"skip": "swiglu", "strict": True})
    assert [s.status for s in sites(report, "swiglu")] == [Status.SKIPPED]
    with pytest.raises(OptionError, match="unknown option 'numeric'"):
        explain(Model(1), inputs(), options={"numeric": "exact"})


def test_a_target_that_is_not_here_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_npu", None)
    with pytest.raises(TargetError, match="torch_npu"):
        explain(Model(1), inputs(), options={"target": "npu"})


def test_a_compiled_model_is_explained_as_the_model_that_it_is() -> None:
    in_place = Model(1)
    in_place.compile(backend="eager")
    compiled_call = in_place._compiled_call_impl
    for model in (torch.compile(Model(1), backend="eager"), in_place):
        report = explain(model, inputs())
        assert report.subject == "Model"
        assert len(sites(report)) == 2
    assert in_place._compiled_call_impl is compiled_call


def test_json_names_the_same_sites() -> None:
    report = explain(Model(2), inputs(), train=True)
    read = json.loads(report.to_json())
    assert [s["module"] for s in read["graphs"][0]["sites"]] == [s.module for s in sites(report)]
    assert read["totals"]["fused"] == {"rms_norm": 2, "swiglu": 2}


# ------------------------------------------------------------------------------------------- breaks and faults


def test_graph_breaks_have_a_reason_and_a_line() -> None:
    report = explain(Broken(), inputs())
    (stop,) = report.breaks
    assert "graph_break" in stop.reason
    assert (stop.file, stop.function, stop.source) == (__file__, "say", "torch._dynamo.graph_break()")
    assert stop.hints and stop.eager_function is None
    assert [s.module for s in sites(report)] == ["norm", "norm"]
    assert len(report.graphs) == 2
    assert [g.graph_id for g in report.graphs] == [0, 1]


def unresumable(x: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        try:
            x = x + 1
            torch._dynamo.graph_break()
        finally:
            x = x * 2
    return x


def test_a_function_that_dynamo_gives_up_on_is_named() -> None:
    report = explain(unresumable, inputs())
    assert report.graphs == ()
    assert [(b.function, b.eager_function) for b in report.breaks] == [("unresumable", "unresumable")]
    assert "Dynamo captured no graph" in str(report)


def recompiled(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return x + 1


def test_the_recompile_limit_is_reported_and_not_left_behind() -> None:
    def calls_often(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        a, b, c = recompiled(x), recompiled(x[:1]), recompiled(x[:, :1])
        return a + b + c + recompiled(x[:, :, :1])

    with torch._dynamo.config.patch(recompile_limit=2):
        report = explain(calls_often, inputs(), dynamic=False)
    assert any("recompile_limit" in f.reason and not f.fatal for f in report.failures)
    count = Count()
    torch.compile(recompiled, backend=count)(inputs())
    assert count.compiled == 1  # a function over its limit is never compiled again: the mark is gone


def test_errors_inside_dynamo_are_part_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(sys.modules["npu_fuse.backend"], "plan", fail)
    report = explain(Model(1), inputs())
    (failure,) = report.failures
    assert failure.error == "BackendCompilerFailed" and failure.fatal
    assert "a fault" in failure.reason


def test_a_model_that_cannot_run_is_an_error_of_the_caller() -> None:
    with pytest.raises(CaptureError, match=r"cannot run with these inputs(.|\n)*What to do"):
        explain(Model(1), torch.randn(2, 8, WIDTH + 1))
    with pytest.raises(CaptureError, match="KeyError"):
        explain(lambda x: {}["absent"], inputs())


# ------------------------------------------------------------------------------------------ nothing left behind


class Count:
    """A backend that counts what it compiles."""

    compiled = 0

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.compiled += 1
        return gm.forward


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.batch_norm, self.dropout = Norm(), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen = self.seen + 1
        self.cached = x.sum()
        x.add_(1)
        return self.dropout(self.batch_norm(self.norm(x)))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("was_training", [False, True])
def test_the_model_and_its_inputs_are_as_before(train: bool, was_training: bool) -> None:
    model, x = Stateful().train(was_training), inputs()
    state, attributes, given = copy.deepcopy(model.state_dict()), dict(vars(model)), x.clone()
    explain(model, x, train=train)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert vars(model) == attributes
    assert all(m.training is was_training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(x, given)


def test_random_states_and_modes_are_as_before() -> None:
    numpy = pytest.importorskip("numpy")
    model, x = Stateful(), inputs()

    def seed() -> None:
        torch.manual_seed(3)
        random.seed(3)
        numpy.random.seed(3)

    seed()
    explain(model, x, train=True)
    drawn = torch.rand(3), random.random(), numpy.random.rand()
    seed()
    expected = torch.rand(3), random.random(), numpy.random.rand()
    assert torch.equal(drawn[0], expected[0]) and drawn[1:] == expected[1:]
    assert torch.is_grad_enabled()
    with torch.no_grad():
        explain(model, x, train=True)
        assert not torch.is_grad_enabled()


def test_dynamo_is_as_before() -> None:
    from torch._dynamo import pgo, utils

    counters, config = copy.deepcopy(dict(utils.counters)), torch._dynamo.config.get_config_copy()
    reasons, sizes = list(utils.graph_break_reasons), copy.deepcopy(pgo._CODE_STATE)
    log = logging.getLogger("torch._dynamo.convert_frame")
    level, filters = log.level, list(log.filters)
    explain(Broken(), inputs())
    assert dict(utils.counters) == counters
    assert torch._dynamo.config.get_config_copy() == config
    assert utils.graph_break_reasons == reasons
    assert sizes == pgo._CODE_STATE
    assert (log.level, log.filters) == (level, filters)


def test_code_that_the_user_compiled_is_kept() -> None:
    model, x, count = Broken(), inputs(), Count()
    mine = torch.compile(model, backend=count)
    with torch.no_grad():
        mine(x)
        before = count.compiled
        for _ in range(3):
            explain(model, x)
        mine(x)
    assert before == 2
    assert count.compiled == before


def test_explaining_often_uses_up_no_recompiles_of_the_user() -> None:
    class NotCompiledYet(Broken):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.say()
            return self.norm(self.norm(x))

    model, count = NotCompiledYet(), Count()
    with torch._dynamo.config.patch(recompile_limit=3):
        for _ in range(4):
            assert len(explain(model, inputs()).graphs) == 1
        mine = torch.compile(model, backend=count, dynamic=False)
        mine(torch.randn(2, 4, WIDTH))
        mine(torch.randn(2, 5, WIDTH))
    assert count.compiled == 2


def test_sizes_seen_do_not_make_the_users_next_compile_dynamic() -> None:
    model, shapes = Model(1), []

    def look(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        shapes.append(any(isinstance(x, torch.SymInt) for x in example_inputs))
        return gm.forward

    for length in (4, 5, 6):
        explain(model, torch.randn(2, length, WIDTH))
    torch.compile(model, backend=look)(torch.randn(2, 7, WIDTH))
    assert shapes == [False]


def test_reports_of_compiled_graphs_are_not_mixed_with_explained_ones() -> None:
    from npu_fuse import reports

    before = reports()
    explain(Model(1), inputs())
    assert reports() == before


def test_a_dump_is_numbered_and_readable(tmp_path: Path) -> None:
    explain(Model(1), inputs(), options={"dump": tmp_path})
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    assert len(files) > 1
    assert "npu_rms_norm" not in files[0].read_text()
    assert "npu_rms_norm" in files[-1].read_text()
