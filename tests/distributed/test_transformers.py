"""Whole models under transformers' tensor-parallel plan: every row-parallel layer fused, results those of one process.

Inference runs on local tensors with reductions in place, training on DTensors: the same plan, two dialects.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import ranks
from .judge import Counting

pytestmark = pytest.mark.distributed

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("LlamaConfig", {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}, 4),
    "qwen3": ("Qwen3Config", {"intermediate_size": 33}, 2),
    "glm4": ("Glm4Config", {}, 2),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, 1),
}
"""Configuration, and the number of row-parallel matmuls: o_proj and down_proj of each layer; experts end in a sum
over the chosen ones, which is no product."""

COPIED = {"llama": 11, "qwen3": 6, "glm4": 5, "mixtral": 4}
"""Column-parallel matmuls whose input's gradient is summed over ranks: q, k, v, gate, up (one in GLM4) and lm_head."""


def build(name: str) -> Any:
    import transformers

    kind, changed, _ = MODELS[name]
    config = getattr(transformers, kind)(**{**SMALL, **changed}, attn_implementation="eager")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def parallel(model: Any, world: int) -> Any:
    """The model's own plan, on parameters that every rank has whole: each keeps its part."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed import DistributedConfig, tensor_parallel

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    plan, *_ = model._resolve_parallel_plans(DistributedConfig(tp_size=world))
    return tensor_parallel.apply_tensor_parallelism(model, mesh, plan)


def gradients(model: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * weights).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / left.norm().clamp_min(1e-12))


def whole_models(rank: int, world: int) -> dict[str, Any]:
    import npu_fuse

    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(5))
    found = {}
    for name in MODELS:
        single = build(name)
        expected = single(ids, use_cache=False).logits
        wanted = gradients(single, expected)
        for train in (False, True):
            torch._dynamo.reset()
            npu_fuse.clear_reports()
            model = parallel(build(name), world)
            counting = Counting()
            compiled = torch.compile(model, backend="npu_fuse", options={"target": "reference", "handoff": counting})
            with torch.set_grad_enabled(train):
                logits = compiled(ids, use_cache=False).logits
            far = [distance(expected, logits)]
            if train:
                grads = gradients(model, logits)
                assert grads.keys() == wanted.keys()
                far += [distance(wanted[n], grads[n]) for n in wanted]
            every = [s for r in npu_fuse.reports() for s in r.sites]
            sites = [(str(s.status), s.reason) for s in every if s.op == "mm_all_reduce"]
            copied = sum(str(s.status) == "fused" for s in every if s.op == "mm_copied")
            found[name, train] = (max(far), sites, copied, dict(counting.counts))
    return found


@pytest.fixture(scope="module")
def models() -> list[dict[Any, Any]]:
    return ranks.run(2, whole_models)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_models(models: Any, name: str, train: bool) -> None:
    for found in models:
        far, sites, copied, counts = found[name, train]
        assert [status for status, _ in sites] == ["fused"] * MODELS[name][2], sites
        assert copied == (COPIED[name] if train else 0)
        assert counts["mm_all_reduce"] == MODELS[name][2] + copied
        assert far < 2e-5
