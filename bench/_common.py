"""What the benchmarks share: four decoders of any width, clocks, and how results are shown."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
for _name, _value in (("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"), ("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")):
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402
import transformers  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

transformers.logging.set_verbosity_error()

ARCHITECTURES = ("llama", "qwen3", "gemma3_text", "deepseek_v3")
VOCABULARY = 256


@dataclass(frozen=True)
class Spent:
    """Seconds of wall clock and of this process's CPU time. The latter bears a machine that others use too."""

    wall: float
    cpu: float


def spent(work: Callable[[], Any]) -> Spent:
    """What one call of `work` takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def config(name: str, width: int, layers: int, head_dim: int = 64) -> Any:
    """The architecture at `width` (a multiple of `2 * head_dim`), with the proportions of its released sizes."""
    heads = width // head_dim
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": width * 3, "use_cache": False,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": max(heads // 2, 1),
        "head_dim": head_dim, "max_position_embeddings": 4096,
    }  # fmt: skip
    if name == "deepseek_v3":
        values |= {
            "q_lora_rank": width // 2, "kv_lora_rank": width // 4, "qk_rope_head_dim": head_dim // 2,
            "qk_nope_head_dim": head_dim, "v_head_dim": head_dim, "num_key_value_heads": heads,
            "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
            "moe_intermediate_size": width // 2, "first_k_dense_replace": 1,
        }  # fmt: skip
        del values["head_dim"]
    return CONFIG_MAPPING[name](**values)


def decoder(name: str, width: int, layers: int, train: bool, dtype: torch.dtype, **settings: Any) -> torch.nn.Module:
    """A causal language model with seeded random weights."""
    torch.manual_seed(0)
    made = config(name, width, layers, **settings)
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(made)
    return model.to(dtype).train(train)


def words(batch: int, sequence: int) -> torch.Tensor:
    """int64 (batch, sequence) token ids."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (batch, sequence), generator=generator)


def step(model: Callable[..., Any], ids: torch.Tensor, train: bool) -> None:
    """One forward pass, and in training a backward pass of a scalar of the logits."""
    with torch.set_grad_enabled(train):
        logits = model(input_ids=ids, use_cache=False).logits
        if train:
            logits.float().square().mean().backward()


def machine() -> dict[str, Any]:
    """What has to stand beside every number."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": round(load, 2),
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def note(text: str) -> None:
    """Progress, apart from the results."""
    Console(stderr=True).print(text, style="dim", highlight=False)


def show(result: dict[str, Any], tables: Sequence[Table], as_json: bool) -> None:
    """The result as JSON on standard output, or its tables."""
    if as_json:
        print(json.dumps(result, indent=1))
        return
    console = Console()
    for table in tables:
        console.print(table)
    console.print(" ".join(f"{k}={v}" for k, v in result["machine"].items()), style="dim", highlight=False)


def mark(ok: bool) -> str:
    """A cell that says whether a target is met."""
    return "[green]met[/]" if ok else "[red]missed[/]"
