"""Which chip runs which op in which dtypes: the table that plans are made with, here or for a chip elsewhere.

Sources: the support tables of torch_npu's documents (op-plugin, docs/zh/custom_APIs/torch_npu, August 2026) and, where
an op has none or the chip is newer, of CANN's (aclnn documents of ops-nn and ops-transformer). A chip whose document
does not name it runs nothing of that op.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from npu_fuse.chip_names import family

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
ALL = (F16, BF16, F32)
OLD = (F16, F32)


@dataclass(frozen=True)
class Support:
    """The dtypes of x that each family takes; a family that is missing has no kernel."""

    families: Mapping[str, tuple[torch.dtype, ...]]
    source: str


def _on(
    source: str, old: tuple[torch.dtype, ...] = (), older: tuple[torch.dtype, ...] = (), newest: bool = True
) -> Support:
    families = {"A2": ALL, "A3": ALL, **({"A5": ALL} if newest else {})}
    return Support({**families, **({"310P": old} if old else {}), **({"910A": older} if older else {})}, source)


SUPPORT: Mapping[str, Support] = {
    "npu_rms_norm": _on("documents of npu_rms_norm and aclnnRmsNorm", OLD, OLD),
    "npu_add_rms_norm": _on("document of npu_add_rms_norm", OLD),
    "npu_rotary_mul": _on("documents of npu_rotary_mul and aclnnRotaryPositionEmbedding", OLD, OLD),
    "npu_swiglu": _on("document of aclnnSwiGlu", OLD),
    "npu_geglu": _on("document of aclnnGeGluV3", OLD),
    "npu_clipped_swiglu": _on("document of npu_clipped_swiglu", newest=False),
    "npu_fast_gelu": _on("documents of npu_fast_gelu and aclnnFastGelu", OLD, OLD),
    "npu_grouped_matmul": _on("documents of npu_grouped_matmul and aclnnGroupedMatmulV5", (F16,)),
    "npu_moe_gating_top_k": _on("documents of npu_moe_gating_top_k and aclnnMoeGatingTopK"),
    "npu_moe_gating_top_k_softmax": _on("document of npu_moe_gating_top_k_softmax", newest=False),
    "npu_moe_gating_top_k_softmax_v2": _on("document of aclnnMoeGatingTopKSoftmaxV2"),
    "npu_moe_token_permute": _on("document of aclnnMoeTokenPermute"),
    "npu_moe_token_unpermute": _on(
        "document of aclnnMoeTokenUnpermute, which on Ascend 950 calls aclnnMoeFinalizeRoutingV2 instead", newest=False
    ),
}


def chip_limit(op: str, soc: str | None, dtype: torch.dtype) -> str | None:
    """Why the chip cannot run a torch_npu op on this dtype, with the source; None where it can, or is not known."""
    made = family(soc) if soc is not None else None
    if made is None:
        return None
    support = SUPPORT[op]
    if made not in support.families:
        return f"{op} has no kernel on {soc} ({support.source})"
    if dtype not in support.families[made]:
        return f"{op} takes no {str(dtype)[6:]} on {soc} ({support.source})"
    return None
