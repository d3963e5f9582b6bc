"""npu_fuse on two real architectures: what is fused, and the same numbers and speed beside eager.

    python examples/quickstart.py [--layers 2] [--width 1024] [--dtype float32]

The models have their real layer structure and random weights; width and depth are what a CPU can bear.
Nothing is downloaded. Most of the time goes to Inductor's C++ compiler, and much less of it in a second run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import Glm4Config, Glm4ForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import npu_fuse
from npu_fuse.render import one_line

BATCH, TOKENS, VOCABULARY = 2, 64, 2048
SECONDS_TIMED = 2.0


def models(width: int, layers: int, dtype: torch.dtype) -> list[PreTrainedModel]:
    """Qwen3 (norms on q and k, half rotary) and GLM-4 (four norms a layer, interleaved partial rotary)."""
    size = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "use_cache": False,
    }
    torch.manual_seed(0)
    made = Qwen3ForCausalLM(Qwen3Config(head_dim=64, **size)), Glm4ForCausalLM(Glm4Config(head_dim=64, **size))
    return [model.to(dtype) for model in made]


def inference(model: Callable[..., object], tokens: torch.Tensor) -> list[torch.Tensor]:
    """The logits."""
    with torch.no_grad():
        return [model(input_ids=tokens).logits]


def training(model: Callable[..., object], tokens: torch.Tensor, parameters: list) -> list[torch.Tensor]:
    """The loss and every gradient."""
    loss = model(input_ids=tokens, labels=tokens).loss
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def differences(ours: list[torch.Tensor], eager: list[torch.Tensor]) -> str:
    """The largest difference, and the largest beside the largest value of its tensor."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, eager, strict=True)]
    largest = max((a - b).abs().max().item() for a, b in pairs)
    relative = max(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs)
    return f"largest difference {largest:.1e}, relative {relative:.1e}"


def steps_per_second(eager: Callable[[], object], ours: Callable[[], object]) -> tuple[float, float]:
    """Medians of both, taken in turns, so that a busy machine slows both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + SECONDS_TIMED
    while time.perf_counter() < end or len(times[0]) < 3:
        for step, spent in zip((eager, ours), times, strict=True):
            start = time.perf_counter()
            step()
            spent.append(time.perf_counter() - start)
    return 1 / statistics.median(times[0]), 1 / statistics.median(times[1])


def show(model: PreTrainedModel) -> None:
    tokens = torch.randint(VOCABULARY, (BATCH, TOKENS))
    parameters = list(model.parameters())
    print(npu_fuse.explain(model, input_ids=tokens, labels=tokens, train=True), "\n")

    compiled = torch.compile(model, backend="npu_fuse")
    for train in (False, True):
        model.train(train)
        extra = (parameters,) if train else ()
        step = training if train else inference
        npu_fuse.clear_reports()
        start = time.perf_counter()
        ours = step(compiled, tokens, *extra)
        spent = time.perf_counter() - start
        eager = step(model, tokens, *extra)
        slow, fast = steps_per_second(partial(step, model, tokens, *extra), partial(step, compiled, tokens, *extra))
        for report in npu_fuse.reports():
            print(one_line(report))
        print(f"  compiled in {spent:.0f} s; {differences(ours, eager)}")
        print(f"  {slow:.2f} steps/s in eager, {fast:.2f} with npu_fuse: {fast / slow:.2f} times as fast\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    for model in models(args.width, args.layers, getattr(torch, args.dtype)):
        show(model)


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"done in {time.perf_counter() - start:.0f} s")
