"""Which implementation runs, and `triton`, `tl` and `jit` that can be imported where Triton is not installed."""
import os
from contextlib import nullcontext
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # macOS, Windows, a CPU-only torch: the kernels below are never launched
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda f: f


def resolve(impl, device):
    """("triton" or "torch", the reason in words) for impl None, "auto", "triton" or "torch" on a torch.device.

    Triton's interpreter (TRITON_INTERPRET=1 before Python starts) runs the kernels on a CPU, slowly: for tests, when asked for.
    """
    cuda, interpreted = torch.device(device).type == "cuda", os.environ.get("TRITON_INTERPRET") == "1"
    if impl == "torch":
        return "torch", "as asked"
    if impl == "triton":
        if triton is None:
            raise ValueError("Triton is not installed here: pip install triton (Linux only), or use torch")
        if not cuda and not interpreted:
            raise ValueError("Triton kernels need a CUDA device; on a CPU only its interpreter runs them, with TRITON_INTERPRET=1 set")
        return "triton", "as asked, interpreted" if interpreted else "as asked"
    if not cuda:
        return "torch", "no CUDA device"
    if triton is None:
        return "torch", "Triton is not installed"
    return "triton", f"CUDA device, Triton {triton.__version__}; a sort where the patches are few"


def on_device_of(x):
    """Triton launches on the current device, which must be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
