"""Dtypes of the products."""

import torch
from torch import Tensor


def as_is(x: Tensor) -> torch.autocast:
    """Compute in the dtypes given: autocast would change some products of a chain and not others."""
    return torch.autocast(x.device.type, enabled=False)
