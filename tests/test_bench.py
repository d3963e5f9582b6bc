"""The benchmarks at tiny sizes: what they print can be trusted, and they run to the end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import _common as common
import _stacked
import _wide
import cpu_runtime
import mc2
import memory
import pass_time
import peers

from npu_fuse import proofs
from npu_fuse.passes import RULES


def run(command: Any, *arguments: str) -> Any:
    """The JSON that a benchmark prints; whatever goes wrong in it is raised here."""
    done = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.stdout)


def test_stacked_layers_compute_what_layers_in_a_row_compute() -> None:
    layer = _stacked.captured_layer()
    stack = _stacked.stacked(layer, 3)
    names = [n.target for n in stack.graph.nodes if n.op == "placeholder"]
    values = {n: torch.randn_like(v) for n, v in _examples(stack).items()}
    hidden = values[names[0]]
    for depth in range(3):
        given = [
            values.get(f"{n.target}_{depth}" if depth and "parameters" in n.name else n.target, hidden)
            for n in layer.graph.nodes
            if n.op == "placeholder"
        ]
        hidden = layer(hidden, *given[1:])[0]
    torch.testing.assert_close(stack(*(values[n] for n in names))[0], hidden)


def _examples(gm: torch.fx.GraphModule) -> dict[str, torch.Tensor]:
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return {str(n.target): torch.empty(n.meta["example_value"].shape) for n in inputs}


def test_growth_counts_every_site_of_every_layer() -> None:
    found = run(pass_time.main, "--part", "growth", "--nodes", "100,300")["growth"]
    layers = [row["sites"] / 7 for row in found["rows"]]
    assert layers == [1.0, 3.0]
    assert all(row["us_per_node"] > 0 and set(row["steps"]) == set(pass_time.STEPS) for row in found["rows"])


@pytest.mark.zoo
def test_first_calls_tell_cold_from_warm() -> None:
    found = run(pass_time.main, "--part", "model", "--layers", "1", "--repeats", "1")["model"]
    for facts in found.values():
        assert facts["sites"] == 8
        assert 0 < facts["warm_steps"]["prove"] < facts["cold_steps"]["prove"] / 3
        assert facts["cold_share"] == pytest.approx(facts["cold_own_cpu"] / facts["plain_cpu"])


def test_a_proof_at_full_width_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_wide.WIDE, "tiny", ("llama", {"hidden_size": 256, "intermediate_size": 512}))
    monkeypatch.setattr(_wide, "HEADS", {**_wide.HEADS, "num_attention_heads": 2, "num_key_value_heads": 2})
    found = pass_time.wide_proofs("tiny")
    assert {p["op"] for p in found} == {"rms_norm", "rotary_mul", "swiglu"} <= {r.name for r in RULES}
    assert all(p["holds"] and p["bytes"] > 0 and p["wall"] > 0 for p in found)
    assert not proofs._verdicts


def test_peak_bytes_is_the_most_alive_at_once() -> None:
    with _wide.peak_bytes() as peak:
        first = torch.ones(1 << 20)
        del first
        second = torch.ones(1 << 18), torch.ones(1 << 18)
        del second
    assert 4 << 20 <= peak[0] < 5 << 20


def test_kept_bytes_counts_storages_once_and_no_parameters() -> None:
    class Logits:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(16))

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Logits:
            once = torch.exp(input_ids * self.weight)  # keeps its result
            return Logits(once * once.view(4, 4).view(16))  # keeps it again, and a view of it

    model = Model()
    assert memory.kept_bytes(memory.Step(model, model, False), torch.arange(16.0)) == 16 * 4


@pytest.mark.zoo
def test_memory_compares_both_ways_of_compiling() -> None:
    arguments = ("--model", "llama", "--handoff", "aot_eager", "--mode", "bf16", "--checkpoint", "no")
    (row,) = run(memory.main, *arguments, "--tokens", "8")["rows"]
    assert row["plain"] > 0 and row["fused"] > 0
    assert row["met"] == (row["fused"] <= row["plain"])


def test_ratios_tell_slower_code_from_equal_code() -> None:
    slow = {"plain": [1.0, 1.1, 0.9] * 9, "again": [1.0, 1.1, 0.9] * 9, "fused": [2.0, 2.2, 1.8] * 9}
    facts = cpu_runtime.judged(slow)
    assert facts["ratio"] == pytest.approx(0.5) and not facts["met"]
    assert facts["control"] == 1.0
    low, high = cpu_runtime.interval([float(n) for n in range(101)])
    assert 30 < low < 50 < high < 70


def test_kinds_take_turns_and_own_their_code() -> None:
    calls: list[str] = []
    steps = {kind: lambda kind=kind: calls.append(kind) for kind in cpu_runtime.KINDS}
    times = cpu_runtime.taken(steps, 20, lambda: float(len(calls)))
    assert all(sorted(calls[i : i + 3]) == sorted(cpu_runtime.KINDS) for i in range(0, 60, 3))
    assert len({tuple(calls[i : i + 3]) for i in range(0, 60, 3)}) > 2
    assert times == {kind: [1.0] * 20 for kind in cpu_runtime.KINDS}
    own = [cpu_runtime._own_code(cpu_runtime._forward, kind).__code__ for kind in cpu_runtime.KINDS]
    assert len(set(own)) == 3


@pytest.mark.slow
def test_runtime_of_a_small_model() -> None:
    arguments = ("--model", "llama", "--mode", "inference", "--width", "128", "--layers", "1", "--tokens", "8")
    (row,) = run(cpu_runtime.main, *arguments, "--rounds", "5")["rows"]
    assert 0.2 < row["ratio"] < 5 and 0.2 < row["control"] < 5


@pytest.mark.zoo
def test_textbook_patterns_fuse_what_is_spelled_like_them() -> None:
    assert peers.by_patterns("llama", "bf16") == peers.truth.load()["llama"]["expected"]
    assert peers.by_patterns("gemma", "bf16")["rms_norm"] == 0  # 1 + w


def test_shares_are_capped_by_truth_and_failures_are_named() -> None:
    rows: dict[str, Any] = {
        "a": {
            "truth": {"rms_norm": 4, "rotary_mul": 2, "glu": 0},
            "patterns": {"rms_norm": 9, "rotary_mul": 1, "glu": 3},
            "npu_fuse": {"rms_norm": 4, "rotary_mul": 2, "glu": 0},
        },
        "b": {"error": "does not run"},
    }
    total = peers.totals(rows)
    assert total["failed"] == ["b"] and total["architectures"] == 1
    whole = {"fused": 4, "complete": 1}
    assert total["rms_norm"] == {"sites": 4, "architectures": 1, "patterns": whole, "npu_fuse": whole}
    assert total["rotary_mul"]["patterns"] == {"fused": 1, "complete": 0}
    assert total["glu"]["architectures"] == 0


def test_decoders_have_the_width_asked_for() -> None:
    for name in common.ARCHITECTURES:
        made = common.config(name, 256, 2)
        assert (made.hidden_size, made.num_hidden_layers, made.vocab_size) == (256, 2, common.VOCABULARY)


def test_communication_is_counted_and_modelled() -> None:
    """Fused, a matmul and its collective are one kernel, and what one rank sends stays the same."""
    found = run(mc2.main, "--model", "tiny", "--ranks", "2", "--rows", "64")["rows"]
    by_form = {row["form"]: row for row in found}
    counts = {"all-reduce": (2, 2), "sequence": (4, 4)}  # reductions; gathers as well
    for form, (collectives, fused) in counts.items():
        plain, after = by_form[form]["plain"], by_form[form]["fused"]
        assert (plain["collectives"], plain["fused"]) == (collectives, 0)
        assert (after["collectives"], after["fused"]) == (collectives, fused)
        assert plain["kernels"] - after["kernels"] == fused
        assert plain["sent"] == after["sent"] > 0
        assert plain["matmul"] == pytest.approx(after["matmul"])
        assert 0 < after["exposed"] < plain["exposed"]
    rows, hidden = 64, mc2.SHAPES["tiny"].hidden
    assert by_form["all-reduce"]["plain"]["sent"] == 2 * rows * hidden * mc2.BYTES  # two sums, 2 (n - 1) / n of each


def test_communication_is_hidden_up_to_the_work() -> None:
    work = mc2.Call("mm_all_reduce", operations=1e12, sent=1e6, steps=1)
    talk = mc2.Call("mm_all_reduce", operations=1.0, sent=1e9, steps=1)
    hidden, bound = (mc2.modelled([c], mc2.PEAK, mc2.LINK) for c in (work, talk))
    assert hidden["exposed"] == pytest.approx((1e6 / mc2.LINK + mc2.LATENCY) / mc2.TILES)
    assert bound["exposed"] == pytest.approx(1e9 / mc2.LINK + mc2.LATENCY, rel=1e-3)
