"""An operator that hands its input back, as torch_npu's does, in a graph whose first call torch checks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.compile import aot_function, nop

from npu_fuse import aliasing

config = torch._functorch.config
pytestmark = pytest.mark.skipif(not hasattr(config, aliasing.RAISES), reason="this torch does not check")


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    with torch.library._scoped_library("npu_fuse_aliasing", "FRAGMENT") as made:
        for name in ("_npu_moe_token_unpermute", "of_the_user"):
            made.define(f"{name}(Tensor x) -> (Tensor, Tensor)")
            made.impl(name, lambda x: (x + 1, x), "CompositeExplicitAutograd")
        yield made


def _compiled(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    op = getattr(torch.ops.npu_fuse_aliasing, name)
    made: Callable[[torch.Tensor], torch.Tensor] = aot_function(lambda x: op(x)[0] * 2, fw_compiler=nop)
    return made


def test_the_operator_is_not_blamed(library: torch.library.Library) -> None:
    x = torch.randn(3)
    with config.patch(aliasing.RAISES, True):
        with pytest.raises(RuntimeError, match="alias"):
            _compiled("_npu_moe_token_unpermute")(x)
        called = aliasing.unblamed_first_call(_compiled("_npu_moe_token_unpermute"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                assert torch.equal(called(x), (x + 1) * 2)
        assert config.error_on_custom_op_aliasing


def test_an_operator_of_the_user_is_told_of(library: torch.library.Library) -> None:
    called = aliasing.unblamed_first_call(_compiled("of_the_user"))
    with pytest.warns(UserWarning, match="of_the_user.*alias"):
        called(torch.randn(3))


def test_only_graphs_that_hold_one_are_wrapped() -> None:
    assert not aliasing.hands_input_back(torch.fx.symbolic_trace(lambda x: x + 1))
