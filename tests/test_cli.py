"""The command line: what it prints, and its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from npu_fuse import __version__
from npu_fuse.cli import main

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.inner = nn.Linear(64, 64)

    def forward(self, x, gate=None):
        h = self.norm(x)
        return nn.functional.silu(self.inner(h)) * (h if gate is None else gate)

x = torch.randn(2, 8, 64)
by_name = lambda: (Net(), {"x": x, "gate": x})
by_place = lambda: (Net(), (x, x))
tensor = lambda: (Net(), x)
nothing = lambda: None
odd_inputs = lambda: (Net(), 3)
wrong_inputs = lambda: (Net(), torch.randn(2, 3))
empty = lambda: ((lambda: 1), ())
look_alike = lambda: ((lambda y: y * torch.rsqrt(y.pow(2).mean(-2, keepdim=True) + 1e-6)), x)

class Holder:
    made = staticmethod(tensor)

def fails():
    raise ValueError("a fault of the user's")
"""


@pytest.fixture(autouse=True)
def a_folder_with_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(SOURCE)
    monkeypatch.delitem(__import__("sys").modules, "nets", raising=False)


def run(*args: str) -> Result:
    result = CliRunner().invoke(main, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_version_and_help() -> None:
    assert __version__ in run("--version").output
    shown = run("--help").output
    assert all(name in shown for name in ("explain", "check", "doctor", "Exit codes"))


@pytest.mark.parametrize("name", ["by_name", "by_place", "tensor", "Holder.made"])
def test_explain_a_callable_with_any_kind_of_inputs(name: str) -> None:
    result = run("explain", f"nets:{name}")
    assert result.exit_code == 0
    assert re.search(r"rms_norm .*1 ", result.output)
    assert "Fused 2 of 2 sites" in result.output
    assert "nets.py:12" in result.output


def test_json_and_nothing_else() -> None:
    result = run("explain", "nets:tensor", "--json", "--train", "--skip", "swiglu")
    read = json.loads(result.stdout)
    assert read["training"] is True
    assert read["totals"]["by_status"] == {"fused": 1, "skipped": 1}


def test_dynamic() -> None:
    read = json.loads(run("explain", "nets:tensor", "--json", "--dynamic").stdout)
    assert [graph["dynamic"] for graph in read["graphs"]] == [True]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nets:nothing"], "must return (model, inputs), not NoneType"),
        (["nets:odd_inputs"], "inputs must be a dict, a tuple or a tensor, not int"),
        (["nets:wrong_inputs"], "the model cannot run with these inputs"),
        (["nets:absent"], "has no attribute 'absent'"),
        (["absent:make"], "No module named 'absent'"),
        (["nets:fails"], "ValueError: a fault of the user's"),
        (["nets:tensor", "--layers", "2"], "--layers is for architectures"),
        (["nets:tensor", "--target", "rference"], "did you mean 'reference'"),
        (["nets:tensor", "--skip", "rms_nrm"], "did you mean 'rms_norm'"),
        (["nets:tensor", "--numerics", "exakt"], "did you mean 'exact'"),
        (["nets:tensor", "--dtype", "int8"], "int8"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_carried_out_exits_with_2_and_says_why(args: list[str], message: str) -> None:
    result = run("explain", *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_explain_exits_with_1_where_nothing_is_captured() -> None:
    result = run("explain", "nets:empty")
    assert result.exit_code == 1
    assert "captured no graph" in result.output


def test_check_passes_and_fails() -> None:
    assert run("check", "nets:tensor", "--require", "rms_norm=1, swiglu=1").exit_code == 0
    result = run("check", "nets:tensor", "--require", "rms_norm=3,swiglu=1,geglu=0,rotary_mul=1")
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "rms_norm: required 3, fused 1 (-2)",
        "rotary_mul: required 1, fused 0 (-1)",
    ]
    assert run("check", "nets:tensor", "--require", "rms_norm=0").exit_code == 1  # more than required, too


def test_check_gives_the_reasons() -> None:
    result = run("check", "nets:look_alike", "--require", "rms_norm=1")
    assert result.exit_code == 1
    assert re.search(r"    missed at nets\.py:23: .+", result.output)


@pytest.mark.parametrize("require", ["", "rms_norm", "rms_norm=x", "rms_norm=-1", "rmsnorm=1"])
def test_a_requirement_that_means_nothing_exits_with_2(require: str) -> None:
    result = run("check", "nets:tensor", "--require", require)
    assert result.exit_code == 2
    assert "--require" in result.stderr


def test_doctor_prints_findings() -> None:
    result = run("doctor")
    assert re.search(r"ok +torch: torch \d", result.output)
    assert result.exit_code == (1 if re.search("^error", result.output, re.MULTILINE) else 0)


# ---------------------------------------------------------------------------------------------- architectures


@pytest.mark.zoo
def test_an_architecture_by_type_class_folder_and_file() -> None:
    pytest.importorskip("transformers")
    counts = "rms_norm=7,rotary_mul=6,swiglu=3"  # two norms a layer and the last one, q and k, one gated MLP
    common = ("--layers", "3", "--train")
    assert run("check", "llama", *common, "--require", counts).output.startswith("as required")
    assert run("check", "LlamaForCausalLM", *common, "--require", counts).exit_code == 0

    from transformers import LlamaConfig

    small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    LlamaConfig(**small, num_hidden_layers=1, architectures=["LlamaForCausalLM"]).save_pretrained("saved")
    for place in ("saved", "saved/config.json"):
        result = run("explain", place, "--full", "--json", "--dtype", "float32")
        read = json.loads(result.stdout)
        assert read["subject"] == "LlamaForCausalLM"
        assert {site["dtype"] for site in read["graphs"][0]["sites"]} == {"float32"}
        assert read["totals"]["fused"]["rotary_mul"] == 2


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3_text", "t5", "vit", "whisper"])
def test_architectures_of_every_kind_are_built_and_fed(name: str) -> None:
    pytest.importorskip("transformers")
    import torch

    from npu_fuse.architectures import build

    state = torch.get_rng_state()
    model, inputs = build(name, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    again, _ = build(name, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lama", "did you mean llama"),
        ("LlamaForCausalML", "did you mean LlamaForCausalLM"),
        ("no/such/config.json", "there is no file or folder"),
    ],
)
def test_an_unknown_architecture_names_the_nearest(name: str, message: str) -> None:
    pytest.importorskip("transformers")
    result = run("explain", name)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "What to do" in result.stderr
