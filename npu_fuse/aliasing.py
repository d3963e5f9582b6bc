"""Keep torch's check of custom operators from blaming the model for what torch_npu's own operator does.

`npu_moe_token_unpermute` is composed of an operator that hands its first argument back, kept for backward, as a
second result, and its schema does not say so (op-plugin, MoeTokenUnpermute). A compiled graph's first call checks
such schemas: it warns, and where the variable CI is set, raises. Nothing reads that result but the operator's own
backward, which does not write to it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from npu_fuse.capture import graphs_of

HANDS_ITS_INPUT_BACK = frozenset(("npu::npu_moe_token_unpermute",))
BLAMED = r"\w+::_npu_moe_token_unpermute "
"""How torch's message begins, in whichever library the operator's kernel is."""
RAISES = "error_on_custom_op_aliasing"


def hands_input_back(gm: GraphModule) -> bool:
    """Whether a graph, or one inside it, holds such an operator where this torch checks for it."""
    return hasattr(torch._functorch.config, RAISES) and any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in HANDS_ITS_INPUT_BACK
        for module in graphs_of(gm)
        for node in module.graph.nodes
    )


def unblamed_first_call(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, whose first call does not tell of these operators; of others it warns also where it would raise.

    The check cannot be left out: it would come with the second call.
    """
    called = False

    @functools.wraps(compiled)
    def call(*args: Any) -> Any:
        nonlocal called
        if called:
            return compiled(*args)
        with torch._functorch.config.patch(RAISES, False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=BLAMED)
            y = compiled(*args)
        called = True
        return y

    return call
