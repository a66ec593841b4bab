"""Stored tensors at the ends of their dtypes."""

import pytest
import torch

from funcnet.backward.memory.storage import decode, encode


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_int8_of_the_greatest_number_is_finite(dtype):
    x = torch.tensor([1.0, -1.0, 0.0] * 100, dtype=dtype) * torch.finfo(dtype).max
    torch.testing.assert_close(decode(*encode(x, "int8", None)), x)
