"""Options: what is accepted, what is refused and in which words, and what enters the compile-cache tag."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import types
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch

import npu_fuse.passes
from npu_fuse import cache_tag
from npu_fuse.errors import NpuFuseError, OptionError, ShadowMismatch, TargetError
from npu_fuse.option_checks import TAKES_NO_MODE, known_ops
from npu_fuse.options import CACHE_DIR_VARIABLE, FrozenMapping, Options, check_options, resolve_target

OPS = ("rms_norm", "rotary_mul", "swiglu")


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    """Three rules whatever passes/ holds, no cache folder and no torch_npu from outside."""
    rules = tuple(types.SimpleNamespace(name=name) for name in OPS)
    monkeypatch.setattr(npu_fuse.passes, "RULES", rules)
    monkeypatch.delenv(CACHE_DIR_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "torch_npu", None)


def hand_off(gm, example_inputs):
    return gm.forward


# ------------------------------------------------------------------------------------------- accepted


@pytest.mark.parametrize(
    ("given", "field", "stored"),
    [
        ({"fuse": "rms_norm"}, "fuse", frozenset({"rms_norm"})),
        ({"fuse": "rms_norm, swiglu,"}, "fuse", frozenset({"rms_norm", "swiglu"})),
        ({"fuse": ["rms_norm", "rms_norm"]}, "fuse", frozenset({"rms_norm"})),
        ({"fuse": "all"}, "fuse", "all"),
        ({"fuse": ()}, "fuse", frozenset()),
        ({"skip": {"swiglu"}}, "skip", frozenset({"swiglu"})),
        ({"handoff": hand_off}, "handoff", hand_off),
        ({"handoff": hand_off, "handoff_options": {"a": 1}}, "handoff_options", {"a": 1}),
        ({"handoff": "npugraph_ex"}, "handoff", "npugraph_ex"),
        ({"handoff": "inductor", "mode": "max-autotune"}, "mode", "max-autotune"),
        ({"mode": "default"}, "mode", None),
        ({"glu_concat": False}, "glu_concat", False),
        ({"mc2_min_rows": 64}, "mc2_min_rows", 64),
        ({"mc2_gather": "again"}, "mc2_gather", "again"),
        ({"moe_gating": "never"}, "moe_gating", "never"),
        ({"prove": "shadow", "shadow_calls": 2}, "shadow_calls", 2),
        ({"target": "npu", "soc": "Ascend910B3"}, "soc", "Ascend910B3"),
        ({"dump": Path("graphs")}, "dump", os.path.abspath("graphs")),
        ({"report_dir": "~/reports"}, "report_dir", os.path.expanduser("~/reports")),
    ],
)
def test_accepted_and_normalised(given, field, stored):
    assert getattr(check_options(given), field) == stored


def test_fuses_follows_fuse_and_skip():
    some = Options(fuse="rms_norm,swiglu")
    assert [some.fuses(op) for op in OPS] == [True, False, True]
    most = Options(skip="rotary_mul")
    assert [most.fuses(op) for op in OPS] == [True, False, True]


def test_names_of_ops_come_from_the_rules():
    assert known_ops() == OPS


def test_options_are_frozen_hashable_and_picklable():
    given = {"capture_limit": 3, "list": [1, {"a": 2}]}
    made = Options(handoff="npugraph_ex", handoff_options=given)
    twin = Options(handoff="npugraph_ex", handoff_options=copy.deepcopy(given))
    assert made == twin and hash(made) == hash(twin) and len({made, twin}) == 1
    assert pickle.loads(pickle.dumps(made)) == made == copy.deepcopy(made)
    assert made != replace(made, handoff_options={"capture_limit": 4})
    with pytest.raises(FrozenInstanceError):
        made.target = "npu"
    with pytest.raises(TypeError):
        made.handoff_options["capture_limit"] = 4
    given["capture_limit"] = 5
    assert made.handoff_options["capture_limit"] == 3
    assert FrozenMapping(given) == given


def test_make_takes_options_dict_or_nothing():
    assert Options.make() == Options.make({}) == Options()
    made = Options(strict=True)
    assert Options.make(made) is made
    assert Options.make(made, mode="reduce-overhead") == Options(strict=True, mode="reduce-overhead")
    assert Options.make({"mode": "max-autotune"}, mode="max-autotune").mode == "max-autotune"


def test_cache_folder_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    assert Options.make().proof_cache == str(tmp_path)
    assert Options.make({"proof_cache": "/elsewhere"}).proof_cache == "/elsewhere"
    monkeypatch.setenv(CACHE_DIR_VARIABLE, "")
    assert Options.make().proof_cache is None


# -------------------------------------------------------------------------------------------- refused

REFUSED = [
    # options, the key to be named, words to be found in the message
    ({"fuze": "all"}, "fuze", ["unknown option", "handoff_options", "did you mean 'fuse'?"]),
    ({3: "all"}, "3", ["unknown option 3", "target"]),
    ({"target": "nppu"}, "target", ["'nppu'", "'auto', 'reference', 'npu'", "did you mean 'npu'?"]),
    ({"target": "NPU"}, "target", ["did you mean 'npu'?"]),
    ({"target": None}, "target", ["None (NoneType)", "'auto'"]),
    ({"numerics": "exactly"}, "numerics", ["did you mean 'exact'?"]),
    ({"prove": True}, "prove", ["True (bool)", "'once', 'always', 'shadow'"]),
    ({"mode": "reduce_overhead"}, "mode", ["did you mean 'reduce-overhead'?"]),
    ({"mode": 3}, "mode", ["3 (int)", "max-autotune"]),
    ({"strict": "yes"}, "strict", ["'yes' (str)", "True or False"]),
    ({"strict": 1}, "strict", ["1 (int)", "True or False"]),
    ({"frozen_weights": None}, "frozen_weights", ["True or False"]),
    ({"mc2_min_rows": -1}, "mc2_min_rows", ["None or a whole number"]),
    ({"mc2_gather": "twice"}, "mc2_gather", ["'graph', 'keep', 'again'"]),
    ({"moe_gating": "training"}, "moe_gating", ["'inference', 'always', 'never'"]),
    ({"glu_concat": "npu"}, "glu_concat", ["'target', True or False"]),
    ({"prove": "shadow", "shadow_calls": 0}, "shadow_calls", ["0 (int)", "above 0"]),
    ({"prove": "shadow", "shadow_calls": True}, "shadow_calls", ["True (bool)"]),
    ({"prove": "shadow", "shadow_action": "warn"}, "shadow_action", ["'raise', 'log'"]),
    ({"shadow_calls": 2}, "shadow_calls", ["prove='shadow'", "'once'"]),
    ({"shadow_action": "log"}, "shadow_action", ["prove='shadow'"]),
    ({"shadow_dump": "d", "prove": "always"}, "shadow_dump", ["'always'"]),
    ({"fuse": "rmsnorm"}, "fuse", ["'rmsnorm'", "rms_norm, rotary_mul, swiglu", "did you mean 'rms_norm'?"]),
    ({"fuse": ["swiglu", 3]}, "fuse", ["names of ops"]),
    ({"fuse": {"swiglu": True}}, "fuse", ["names of ops"]),
    ({"fuse": None}, "fuse", ["None (NoneType)", "'all'"]),
    ({"skip": "all"}, "skip", ["'all'", "rms_norm, rotary_mul, swiglu"]),
    ({"skip": 4}, "skip", ["4 (int)"]),
    ({"fuse": "swiglu", "skip": "swiglu"}, "skip", ["swiglu stands in 'fuse' too"]),
    ({"soc": "Ascend910B3"}, "soc", ["target 'npu'", "'auto'"]),
    ({"soc": "Ascend910B3", "target": "reference"}, "soc", ["'reference'"]),
    ({"soc": "", "target": "npu"}, "soc", ["name of a chip"]),
    ({"handoff": "inducter"}, "handoff", ["'inducter'", "aot_eager", "did you mean 'inductor'?"]),
    ({"handoff": "zzzz"}, "handoff", ["import the package that registers"]),
    ({"handoff": 3}, "handoff", ["3 (int)", "callable"]),
    ({"handoff": "npu_fuse"}, "handoff", ["npu_fuse itself"]),
    ({"handoff_options": {"a": 1}}, "handoff_options", ["no hand-off is named"]),
    ({"handoff_options": [1], "handoff": "inductor"}, "handoff_options", ["[1] (list)", "strings"]),
    ({"handoff_options": {1: 1}, "handoff": "inductor"}, "handoff_options", ["strings"]),
    (
        {"handoff_options": {"a": 1}, "handoff": "aot_eager"},
        "handoff_options",
        ["'aot_eager' ignores options"],
    ),
    ({"mode": "max-autotune", "handoff": hand_off}, "mode", ["fn(gm, example_inputs)", "'max-autotune'"]),
    ({"mode": "max-autotune", "handoff": "aot_eager"}, "mode", ["'aot_eager' ignores mode"]),
    ({"mode": "max-autotune", "handoff": "npugraph_ex"}, "mode", ["'npugraph_ex' ignores mode"]),
    ({"proof_cache": 3}, "proof_cache", ["path of a folder"]),
    ({"dump": ""}, "dump", ["path of a folder"]),
    ({"report_dir": b"x"}, "report_dir", ["path of a folder"]),
]


@pytest.mark.parametrize(("given", "key", "words"), REFUSED)
def test_refused_in_words_that_help(given, key, words):
    with pytest.raises(OptionError) as caught:
        check_options(given)
    assert caught.value.key == key
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "What to do: " in message and not message.endswith("What to do: ")


def test_every_option_has_a_refusal_above():
    assert {key for _, key, _ in REFUSED} >= {f.name for f in fields(Options)}


def test_options_that_are_no_mapping():
    with pytest.raises(OptionError, match=r"str.*allowed: a dict or npu_fuse\.Options"):
        Options.make("strict")


def test_mode_given_twice():
    with pytest.raises(OptionError, match="contradicts"):
        Options.make({"mode": "max-autotune"}, mode="reduce-overhead")
    with pytest.raises(OptionError, match="ignores mode"):
        Options.make({"handoff": "eager"}, mode="reduce-overhead")


def test_hand_offs_that_ignore_mode_are_torchs_own_names():
    known = set(torch.compiler.list_backends(exclude_tags=()))
    assert TAKES_NO_MODE - {"npu", "npugraph_ex", "npugraphs"} <= known


def test_readable_inside_torchs_wrapper():
    def backend(gm, example_inputs, *, options=None, mode=None):
        Options.make(options, mode)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend=backend, options={"targte": "npu"})
    with pytest.raises(Exception, match=r"(?s)unknown option 'targte'.*did you mean 'target'\?") as caught:
        compiled(torch.ones(2))
    assert type(caught.value).__name__ == "BackendCompilerFailed"


def test_readable_through_the_installed_backend():
    pytest.importorskip("npu_fuse.backend", reason="the backend is not written yet")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend="npu_fuse", options={"targte": "npu"})
    with pytest.raises(Exception, match=r"(?s)unknown option 'targte'.*did you mean 'target'\?"):
        compiled(torch.ones(2))


def test_errors_survive_pickling():
    for error in (
        OptionError("a", key="k", remedy="r"),
        ShadowMismatch("b", dump="d", remedy="r"),
        TargetError("c"),
    ):
        copied = pickle.loads(pickle.dumps(error))
        assert type(copied) is type(error) and str(copied) == str(error) and vars(copied) == vars(error)
        assert isinstance(copied, NpuFuseError)


# --------------------------------------------------------------------------------------------- target


def fake_torch_npu(monkeypatch, available):
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    npu = types.SimpleNamespace(
        is_available=lambda: available,
        is_initialized=lambda: available,
        get_device_name=lambda: "Ascend910B3",
    )
    monkeypatch.setattr(torch, "npu", npu, raising=False)


def test_target_without_torch_npu(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch_npu")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "torch_npu").exists()])
    assert resolve_target(Options()) == "reference"
    with pytest.raises(TargetError, match=r"(?s)not installed.*pip install torch-npu.*target='reference'"):
        resolve_target(Options(target="npu"))


def test_target_with_a_torch_npu_that_does_not_load(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torch_npu")
    (tmp_path / "torch_npu.py").write_text("raise OSError('libhccl.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_target(Options()) == "reference"
    with pytest.raises(TargetError, match=r"(?s)OSError: libhccl.so.*set_env\.sh"):
        resolve_target(Options(target="npu"))


@pytest.mark.parametrize(("available", "target"), [(True, "npu"), (False, "reference")])
def test_auto_follows_the_device(monkeypatch, available, target):
    fake_torch_npu(monkeypatch, available)
    assert resolve_target(Options()) == target
    assert resolve_target(Options(target="reference")) == "reference"
    assert resolve_target(Options(target="npu", soc="Ascend910B3")) == "npu"


# ------------------------------------------------------------------------------------------ cache tag

CHANGES = [
    {"handoff": "aot_eager"},
    {"handoff": hand_off},
    {"handoff": "inductor", "handoff_options": {"a": [1]}},
    {"fuse": "rms_norm"},
    {"skip": "rms_norm"},
    {"numerics": "exact"},
    {"prove": "shadow"},
    {"glu_concat": True},
    {"mc2_min_rows": 64},
    {"mc2_gather": "again"},
    {"moe_gating": "always"},
    {"frozen_weights": True},
    {"mode": "max-autotune"},
]


def test_what_changes_a_graph_changes_the_tag(monkeypatch):
    tags = {check_options(given).cache_tag() for given in [{}, *CHANGES]}
    assert len(tags) == len(CHANGES) + 1
    fake_torch_npu(monkeypatch, True)
    on_npu = {Options().cache_tag(), Options(target="npu", soc="Ascend910B3").cache_tag()}
    assert len(on_npu) == 2 and not on_npu & tags
    assert Options(target="npu").cache_tag() == Options().cache_tag()


def test_where_things_are_written_does_not_change_the_tag():
    assert Options(dump="a", report_dir="b", proof_cache="c").cache_tag() == Options().cache_tag()


def test_a_closure_is_told_by_what_it_captured():
    def make(scale):
        def fn(gm, example_inputs):
            return lambda *args: [scale * out for out in gm(*args)]

        return fn

    one, two, other = (Options(handoff=make(scale)).cache_tag() for scale in (1, 1, 2))
    assert one == two != other


def tag_in_new_process(root, seed):
    code = (
        "from npu_fuse.options import Options; import npu_fuse; print(npu_fuse.__file__);"
        "print(Options(handoff='inductor', handoff_options={'b': {'x', 'y', 'z'}, 'a': 1}).cache_tag())"
    )
    env = dict(os.environ, PYTHONPATH=str(root), PYTHONHASHSEED=str(seed))
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, text=True, check=True, capture_output=True)
    file, tag = done.stdout.split()
    assert Path(file).is_relative_to(root)
    return tag


def test_the_tag_is_stable_between_processes_and_follows_the_sources(tmp_path):
    package = Path(cache_tag.__file__).parent
    shutil.copytree(package, tmp_path / "npu_fuse", ignore=shutil.ignore_patterns("__pycache__"))
    before = tag_in_new_process(tmp_path, 1)
    assert before == tag_in_new_process(tmp_path, 2)
    rule = tmp_path / "npu_fuse" / "passes" / "__init__.py"
    rule.write_text(rule.read_text() + "# another formula\n")
    assert before != tag_in_new_process(tmp_path, 1)
