"""The pass over functionalised aten graphs, on the two ways on which vLLM and vllm-ascend run passes; no vLLM here."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config as inductor_config

import npu_fuse
from npu_fuse.errors import OptionError
from npu_fuse.integrations.vllm import OPTIONS_VARIABLE, FusePass
from npu_fuse.options import Options
from npu_fuse.report import Status, clear_reports, reports

HEADS, GROUPS, WIDTH, HIDDEN = 4, 2, 32, 64
TOLERANCE = {torch.float32: 32 * 2.0**-23, torch.bfloat16: 8 * 2.0**-8}
"""Absolute, of values around one: the rounding of some chained operations in units of the dtype's step."""

LIBRARY = torch.library.Library("npu_fuse_test_aten", "DEF")
LIBRARY.define("project(Tensor(a!) out, Tensor x, Tensor w) -> ()")


def _project(out, x, w):
    out.copy_(x @ w)


LIBRARY.impl("project", _project, "CompositeExplicitAutograd")
torch.library.register_fake("npu_fuse_test_aten::project", _project, lib=LIBRARY)


def project(x, w):
    """A linear layer that no pass sees into, as vLLM's are."""
    out = torch.empty(x.shape[0], w.shape[1], dtype=x.dtype)
    torch.ops.npu_fuse_test_aten.project(out, x, w)
    return out


def norm(x, w):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(w.dtype) * w


def add_norm(x, residual, w):
    """As vLLM writes it: the sum in float32, the residual out is the sum rounded."""
    wide = x.float() + residual.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(w.dtype) * w, wide.to(x.dtype)


def rope(x, cos, sin):
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def layer(ids, table, weights, positions, cache):
    """A decoder layer with merged projections around an attention that is no more than a sum."""
    qkv_w, out_w, gate_up_w, down_w, first, second, last = weights
    x = torch.nn.functional.embedding(ids, table)
    tokens = x.shape[0]
    qkv = project(norm(x, first), qkv_w)
    q, k, v = qkv.split([HEADS * WIDTH, GROUPS * WIDTH, GROUPS * WIDTH], -1)
    cos, sin = cache.index_select(0, positions).chunk(2, -1)
    q = rope(q.view(tokens, -1, WIDTH), cos, sin).reshape(q.shape)
    k = rope(k.view(tokens, -1, WIDTH), cos, sin).reshape(k.shape)
    attended = q + torch.cat((k, v), -1)
    h, residual = add_norm(project(attended, out_w), x, second)
    gate_up = project(h, gate_up_w)
    half = gate_up.shape[-1] // 2
    h = torch.nn.functional.silu(gate_up[..., :half]) * gate_up[..., half:]
    return add_norm(project(h, down_w), residual, last)


def values(dtype, tokens=7, seed=0):
    torch.manual_seed(seed)
    merged = (HEADS + 2 * GROUPS) * WIDTH
    shapes = [(HIDDEN, merged), (HEADS * WIDTH, HIDDEN), (HIDDEN, 192), (96, HIDDEN)]
    weights = [torch.randn(s, dtype=dtype) / s[0] ** 0.5 for s in shapes]
    weights += [1 + torch.randn(HIDDEN, dtype=dtype) / 8 for _ in range(3)]
    angles = torch.arange(64)[:, None] * 0.5 ** torch.arange(WIDTH // 2)
    cache = torch.cat((angles.cos(), angles.sin()), -1)
    ids = torch.randint(0, 50, (tokens,))
    return ids, torch.randn(50, HIDDEN, dtype=dtype), weights, torch.arange(tokens), cache


def by_inductor(function, fuse):
    def run(*args):
        with inductor_config.patch(post_grad_custom_post_pass=fuse, fx_graph_cache=False):
            return torch.compile(function)(*args)

    return run


def by_pass_manager(function, fuse):
    """aot_autograd without decompositions, then passes over the module, as vllm-ascend does."""

    def compiler(gm, _):
        fuse(gm)
        gm.recompile()
        return gm

    return torch.compile(function, backend=aot_autograd(fw_compiler=compiler, inference_compiler=compiler))


WAYS = {"inductor": by_inductor, "pass manager": by_pass_manager}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(OPTIONS_VARIABLE, raising=False)
    torch._dynamo.reset()
    clear_reports()
    with torch.no_grad():
        yield


def mark(ids, positions):
    for tensor in (ids, positions):
        torch._dynamo.mark_dynamic(tensor, 0)


def found():
    return sorted(site.op for report in reports() for site in report.sites if site.status is Status.FUSED)


def made(**options):
    return FusePass(Options.make({"target": "reference", **options}))


@pytest.mark.parametrize(
    ("way", "dtype", "dynamic"),
    [
        ("inductor", torch.float32, False),
        ("inductor", torch.bfloat16, True),
        ("pass manager", torch.float32, True),
        ("pass manager", torch.bfloat16, False),
        ("pass manager", torch.bfloat16, True),
    ],
)
def test_a_decoder_layer(way, dtype, dynamic):
    ids, table, weights, positions, cache = values(dtype)
    if dynamic:
        mark(ids, positions)
    run = WAYS[way](layer, made())
    results = run(ids, table, weights, positions, cache)
    exact = layer(ids, table.double(), [w.double() for w in weights], positions, cache.double())
    plain = layer(ids, table, weights, positions, cache)
    for result, wanted, original in zip(results, exact, plain, strict=True):
        assert result.dtype == dtype
        error, own = ((r.double() - wanted).abs().max().item() for r in (result, original))
        assert error <= max(own, TOLERANCE[dtype]) + TOLERANCE[dtype]
    # A bf16 sum that is normalised before it is rounded is more accurate than npu_add_rms_norm: the norm alone.
    norms = ["add_rms_norm"] * 2 + ["rms_norm"] if dtype == torch.float32 else ["rms_norm"] * 3
    assert found() == sorted([*norms, "rotary_mul", "rotary_mul", "swiglu"])
    assert not [site for report in reports() for site in report.sites if site.status is not Status.FUSED]


@pytest.mark.parametrize("way", WAYS)
def test_weights_changed_in_place_are_seen(way):
    given = values(torch.float32)
    run = WAYS[way](layer, made())
    before = run(*given)
    for tensor in (given[1], *given[2]):
        tensor.add_(torch.randn_like(tensor) * 0.1)
    after = run(*given)
    assert len(reports()) == 1
    assert not torch.allclose(before[0], after[0], atol=1e-2)
    for result, wanted in zip(after, layer(*given), strict=True):
        torch.testing.assert_close(result, wanted, atol=64 * TOLERANCE[torch.float32], rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_in_place_keeps_its_value(way):
    """A residual stream written in place, and an input: both are seen by the caller as without the pass."""

    def step(x, w, square, out):
        y = norm(x, w)
        x += y
        out.copy_(project(x, square))
        return y

    def given():
        torch.manual_seed(1)
        return torch.randn(5, HIDDEN), torch.randn(HIDDEN), torch.randn(HIDDEN, HIDDEN) / 8, torch.zeros(5, HIDDEN)

    mine, theirs = given(), given()
    result, wanted = WAYS[way](step, made())(*mine), step(*theirs)
    assert found() == ["rms_norm"]
    for one, other in zip((result, *mine), (wanted, *theirs), strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE[torch.float32] * 4, rtol=0)


def test_near_misses_stay():
    """A clamp before the mean, halves that are rotated by another table each: nothing is fused, nothing changes."""

    def near(x, w, cos, sin):
        wide = x.float().clamp(-1, 1)
        y = wide * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * w
        first, second = x.chunk(2, -1)
        return y, torch.cat((first * cos - second * sin, second * sin + first * cos), -1)

    x, w = torch.randn(5, WIDTH), torch.randn(WIDTH)
    cos, sin = torch.randn(5, WIDTH // 2), torch.randn(5, WIDTH // 2)
    for way in WAYS.values():
        torch._dynamo.reset()
        for one, other in zip(way(near, made())(x, w, cos, sin), near(x, w, cos, sin), strict=True):
            torch.testing.assert_close(one, other)
    assert found() == []


# --- the pass object ---------------------------------------------------------------------------------


def test_the_uuid_tells_options_and_targets_apart(monkeypatch):
    monkeypatch.setattr(npu_fuse.options, "_import_torch_npu", lambda: None)
    uuids = [
        made().uuid(), made(numerics="exact").uuid(), made(skip=["swiglu"]).uuid(),
        FusePass(Options.make({"target": "npu", "soc": "Ascend910B3"})).uuid(),
        FusePass(Options.make({"target": "npu", "soc": "Ascend310P3"})).uuid(),
    ]  # fmt: skip
    assert len(set(uuids)) == len(uuids)
    assert made().uuid() == uuids[0] and made(report_dir="elsewhere").uuid() == uuids[0]
    monkeypatch.setenv(OPTIONS_VARIABLE, '{"target": "reference", "numerics": "exact"}')
    assert npu_fuse.vllm_pass.uuid() == uuids[1]


def test_the_uuid_changes_with_the_rules(tmp_path):
    """Another process, in which one rule's source has one more line."""
    program = "import npu_fuse; print(npu_fuse.vllm_pass.uuid())"
    root = tmp_path / "copy"
    source = os.path.dirname(npu_fuse.__file__)
    shutil.copytree(source, root / "npu_fuse", ignore=shutil.ignore_patterns("__pycache__"))

    def uuid():
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, check=True
        )
        return done.stdout.decode().strip()

    before = uuid()
    assert before == uuid()
    with open(root / "npu_fuse" / "passes" / "swiglu.py", "a") as rule:
        rule.write("\n# another formula\n")
    assert uuid() != before


def test_pickles_and_copies():
    assert pickle.loads(pickle.dumps(npu_fuse.vllm_pass)) is npu_fuse.vllm_pass
    assert vars(npu_fuse)["vllm_pass"] is npu_fuse.vllm_pass  # vLLM looks there, and nowhere else
    own = made(numerics="exact", skip=["swiglu"])
    again = pickle.loads(pickle.dumps(own))
    assert type(again) is FusePass and again.uuid() == own.uuid() and again.options == own.options
    assert copy.deepcopy(own) is own and copy.deepcopy({"key": npu_fuse.vllm_pass})["key"] is npu_fuse.vllm_pass


@pytest.mark.parametrize(
    ("text", "word"), [("{strict}", "no JSON"), ('{"numeric": "exact"}', "numerics"), ('{"target": "gpu"}', "target")]
)
def test_a_wrong_option_is_told(text, word, monkeypatch):
    monkeypatch.setenv(OPTIONS_VARIABLE, text)
    with pytest.raises(OptionError, match=word):
        npu_fuse.vllm_pass.uuid()


def test_options_reach_the_pass(monkeypatch, tmp_path):
    monkeypatch.setenv(OPTIONS_VARIABLE, json.dumps({"target": "reference", "fuse": ["swiglu"]}))
    by_pass_manager(layer, npu_fuse.vllm_pass)(*values(torch.float32))
    assert found() == ["swiglu"]
