"""torch's compile caches never serve a graph made under another formula or other options.

Four processes share one cache directory; npu_fuse's package is a copy whose formula one of them changes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters

def norm(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

options = json.loads(sys.argv[1])
x, w = torch.linspace(-1, 1, 64).reshape(4, 16), torch.linspace(0.5, 1.5, 16)
y = torch.compile(norm, backend="npu_fuse", options=options)(x, w)
import npu_fuse
print(json.dumps({
    "source": npu_fuse.__file__,
    "fused": [s.status.value for r in npu_fuse.reports() for s in r.sites],
    "hits": counters["aot_autograd"]["autograd_cache_hit"],
    "close": bool(torch.allclose(y, norm(x, w))),
}))
"""
FORMULA = "return torch.rsqrt(wide.pow(2).mean("
ANOTHER = "return 1.0 / torch.sqrt(wide.pow(2).mean("


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of npu_fuse that a test may change, with the entry point that torch.compile looks up."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "npu_fuse", folder / "npu_fuse", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def compiled(package: Path, cache: Path, options: dict[str, object]) -> dict[str, object]:
    environment = {**os.environ, "PYTHONPATH": str(package), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    environment |= {"TORCHINDUCTOR_AUTOGRAD_CACHE": "1", "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(options)]
    done = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert str(package) in str(result["source"])
    assert result["close"]
    return result


def test_a_changed_formula_or_option_is_compiled_anew(package: Path, tmp_path: Path) -> None:
    options: dict[str, object] = {"target": "reference", "handoff": "inductor"}
    first = compiled(package, tmp_path, options)
    assert first["fused"] == ["fused"]
    assert first["hits"] == 0
    assert compiled(package, tmp_path, options)["hits"] == 1

    other = compiled(package, tmp_path, {**options, "numerics": "exact"})
    assert other["hits"] == 0

    rule = package / "npu_fuse" / "passes" / "rms_norm.py"
    text = rule.read_text(encoding="utf-8")
    assert FORMULA in text
    rule.write_text(text.replace(FORMULA, ANOTHER), encoding="utf-8")
    changed = compiled(package, tmp_path, options)
    assert changed["fused"] == ["fused"]
    assert changed["hits"] == 0
