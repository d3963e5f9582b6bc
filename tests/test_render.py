"""Tables, log lines and JSON from hand-made reports."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from npu_fuse import render
from npu_fuse.explain import ExplainReport
from npu_fuse.report import FORMAT_VERSION, Cost, GraphReport, ProofFacts, SiteReport, Status
from npu_fuse.stops import Break, Failure

DOCUMENT = Path(__file__).parent.parent / "docs" / "report_format.md"


def site(**changes: object) -> SiteReport:
    made = SiteReport(
        op="rms_norm",
        status=Status.FUSED,
        reason="",
        file="/models/modeling_x.py",
        line=63,
        function="forward",
        source="return self.weight * x",
        module="model.layers.0.input_layernorm",
        dtype="bfloat16",
        shape=("2", "16", "64"),
        params={"epsilon": "1e-06"},
        rounding=("bfloat16", "float32", "bfloat16"),
        proof=ProofFacts(probes=9, same_function=1e-12, original_ulp=0.89, fused_ulp=0.5),
        before=Cost(ops=8, bytes_moved=74_600, bytes_saved=16_800),
        after=Cost(ops=2, bytes_moved=16_800, bytes_saved=4_350),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def graph(*sites: SiteReport, **changes: object) -> GraphReport:
    made = GraphReport(0, training=False, target="reference", handoff="inductor", nodes=224, sites=sites)
    return replace(made, **changes)  # type: ignore[arg-type]


MISSED = site(
    op="geglu", status=Status.MISSED, reason="the gate is a relu", code="geglu.gate", proof=None, module="model.mlp"
)


def layers(count: int, **changes: object) -> list[SiteReport]:
    return [site(module=f"model.layers.{i}.input_layernorm", **changes) for i in range(count)]


def test_layers_are_one_row_with_a_count_and_a_pattern() -> None:
    (row,) = render.rows(layers(28))
    assert (row.count, row.module) == (28, "model.layers.*.input_layernorm")


def test_a_single_site_keeps_its_own_path() -> None:
    (row,) = render.rows([site(module="model.layers.7.norm")])
    assert row.module == "model.layers.7.norm"


def test_only_what_varies_becomes_a_star() -> None:
    sites = [site(module=f"blocks.3.experts.{i}.norm") for i in range(4)]
    assert [row.module for row in render.rows(sites)] == ["blocks.3.experts.*.norm"]


@pytest.mark.parametrize(
    "change",
    [
        {"line": 64},
        {"shape": ("2", "16", "32")},
        {"dtype": "float32"},
        {"params": {"epsilon": "1e-05"}},
        {"status": Status.MISSED, "reason": "another dim"},
        {"after": Cost(ops=3)},
        {"proof": ProofFacts(original_ulp=0.89, fused_ulp=0.7)},
        {"notes": ("overflows less",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_sites_that_differ_in_a_fact_are_two_rows(change: dict[str, object]) -> None:
    assert len(render.rows([*layers(2), *layers(2, **change)])) == 2


def test_whether_a_proof_came_from_a_cache_makes_no_row_of_its_own() -> None:
    cached = ProofFacts(probes=9, same_function=1e-12, original_ulp=0.89, fused_ulp=0.5, cached=True, seconds=1.0)
    assert len(render.rows([site(), site(proof=cached)])) == 1


def test_fused_sites_come_first() -> None:
    assert [row.site.op for row in render.rows([MISSED, site()])] == ["rms_norm", "geglu"]


def test_table_shows_each_fact() -> None:
    report = ExplainReport("ModelX", False, (graph(*layers(28), MISSED),))
    shown = re.sub(r"\s+", " ", render.text(report, 160))
    for fact in (
        "ModelX, inference, target reference, 1 graph, 224 nodes",
        "model.layers.*.",
        "input_layernorm",
        "modeling_x.py:63",
        "bf16[2, 16, 64]",
        "via bf16 > f32 > bf16",
        "epsilon=1e-06",
        "ops 8 -> 2",
        "moved 74.6 -> 16.8 kB",
        "kept 16.8 -> 4.35 kB",
        "0.89 -> 0.50",
        "the gate is a relu",
        "Fused 28 of 29 sites (1 missed): ops 224 -> 56, moved 2.09 -> 0.47 MB, kept 470 -> 122 kB.",
    ):
        assert fact in shown
    assert str(report) == render.text(report)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_table_keeps_its_width_and_loses_no_text(width: int) -> None:
    report = ExplainReport("ModelX", True, (graph(site(module="a_very_long_name." * 6 + "norm"), MISSED),))
    lines = render.text(report, width).splitlines()
    assert max(map(len, lines)) <= width
    assert "relu" in "".join(lines)


def test_symbolic_costs_are_marked() -> None:
    assert "moved ~" in render.text([graph(site(before=Cost(8, 500, symbolic=True)))])


def test_no_site_says_so() -> None:
    assert "Fused 0 of 0 sites: no candidate in 1 graph of 224 nodes." in render.text([graph()])
    assert "compiled no graph" in render.text([])


def test_nothing_captured_says_so() -> None:
    assert "Dynamo captured no graph" in render.text(ExplainReport("f", False))


def test_breaks_and_failures_are_listed_with_their_lines() -> None:
    report = ExplainReport(
        "f",
        False,
        (graph(),),
        (Break("print is not traced", ("remove it",), "/m/a.py", 12, "forward", "print(x)", "forward", 3),),
        (Failure("InternalTorchDynamoError", "it broke", "/m/b.py", 9, "g", "y = x"),),
    )
    shown = render.text(report)
    for fact in (
        "Graph breaks (1)",
        "/m/a.py:12 in forward (x3)",
        "print(x)",
        "print is not traced",
        "Hint: remove it",
        "Dynamo gave up on forward",
        "Failures of Dynamo (1)",
        "/m/b.py:9 in g",
        "InternalTorchDynamoError: it broke",
        "torch.compile raises this",
    ):
        assert fact in shown


def test_faults_of_npu_fuse_are_shown() -> None:
    assert "Fault in npu_fuse, graph 0 left as it was: KeyError: 'x'" in render.text([graph(errors=("KeyError: 'x'",))])


def test_one_line_names_fused_and_not_fused() -> None:
    sites = [
        *[site()] * 9,
        *[site(op="rotary_mul")] * 4,
        *[site(op="swiglu")] * 2,
        replace(MISSED, file="/m/file.py", line=12),
    ]
    assert render.one_line(graph(*sites, training=True)) == (
        "graph 0 (training): fused rms_norm 9, rotary_mul 4, swiglu 2; "
        "not fused: geglu 1 (the gate is a relu at file.py:12)"
    )


def test_one_line_is_never_silent() -> None:
    assert render.one_line(graph()) == "graph 0 (inference): no site to fuse among 224 nodes"
    assert "fault in npu_fuse, graph left as it was: ValueError: x" in render.one_line(graph(errors=("ValueError: x",)))


def test_one_line_is_one_line_and_counts_what_it_leaves_out() -> None:
    many = [replace(MISSED, line=line) for line in range(9)]
    line = render.one_line(graph(*many, errors=("ValueError: a\nb",)))
    assert "\n" not in line
    assert "and 5 more" in line


def test_one_line_without_a_source_names_the_module() -> None:
    assert "at model.mlp)" in render.one_line(graph(replace(MISSED, file=None, line=None)))


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ((0,), "0 B"),
        ((999,), "999 B"),
        ((1536,), "1.54 kB"),
        ((1_540_000, 200_000), "1.54 -> 0.2 MB"),
        ((3, 5_000_000_000_000_000), "3e-12 -> 5e+03 TB"),
    ],
)
def test_human_bytes(counts: tuple[int, ...], shown: str) -> None:
    assert render.human_bytes(*counts) == shown


# ------------------------------------------------------------------------------------------------------ JSON


def every_report() -> ExplainReport:
    odd = site(proof=ProofFacts(same_function=float("nan"), fused_ulp=float("inf")))
    return ExplainReport("M", True, (graph(site(), odd, MISSED, training=True),), (Break("b"),), (Failure("E", "f"),))


def test_json_is_standard_and_complete() -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not standard JSON")

    read = json.loads(every_report().to_json(), parse_constant=no_constant)
    assert read == every_report().to_dict()
    assert (read["format"], read["version"]) == ("npu_fuse.explain", FORMAT_VERSION)
    assert read["graphs"][0]["sites"][0]["shape"] == ["2", "16", "64"]
    assert read["graphs"][0]["sites"][1]["proof"]["same_function"] == "nan"
    assert read["graphs"][0]["sites"][1]["proof"]["fused_ulp"] == "inf"
    assert read["totals"] == {
        "sites": 3,
        "by_status": {"fused": 2, "missed": 1},
        "fused": {"rms_norm": 2},
        "before": {"ops": 16, "bytes_moved": 149_200, "bytes_saved": 33_600, "symbolic": False},
        "after": {"ops": 4, "bytes_moved": 33_600, "bytes_saved": 8_700, "symbolic": False},
    }


def test_every_field_of_the_json_is_documented() -> None:
    described = set(re.findall(r"^\| `([a-z_0-9]+)` \|", DOCUMENT.read_text(), re.MULTILINE))
    types = (ExplainReport, GraphReport, SiteReport, ProofFacts, Cost, Break, Failure)
    names = {field.name for kind in types for field in fields(kind)}
    names |= set(every_report().to_dict()) | set(every_report().to_dict()["totals"])
    assert described == names | {status.value for status in Status}
    assert f"version {FORMAT_VERSION}" in DOCUMENT.read_text()
