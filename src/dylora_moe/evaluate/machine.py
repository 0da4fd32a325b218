"""What this machine computes in."""

import torch


def base_dtype(*, bf16: bool | None, fp16: bool) -> torch.dtype:
    """The dtype to load the base in.

    bfloat16 where the hardware computes in it: GPUs that say so, CPUs with AVX512-BF16 or AMX. On a CPU without,
    it was measured at a third of float32's speed (docs/log.md).
    """
    if fp16:
        return torch.float16
    return torch.bfloat16 if (has_bf16() if bf16 is None else bf16) else torch.float32


def has_bf16() -> bool:
    """True when this machine computes in bfloat16 natively."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
