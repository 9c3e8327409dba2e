"Equal up to rounding: what is allowed is a share of the size of what is compared, so that it holds on every processor."
import torch
from torch import Tensor


def assert_near(
    got: Tensor,
    expected: Tensor,
    share: float = 1e-4,  # of the largest expected value
) -> None:
    "No value differs by more than `share` of the largest expected one, and type and shape are the same."
    allowed = share * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=allowed)
