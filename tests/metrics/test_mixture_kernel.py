"""The Triton kernel of the Jensen-Shannon divergence, on the CPU by Triton's interpreter."""

import os
import subprocess
import sys

import pytest

from vitzoo_hf.metrics.mixture_kernel import has_triton

PROGRAM = """
import torch
from vitzoo_hf.metrics import mixture_kernel

mixture_kernel.LEAST_COLUMNS = 64  # several parts without many columns: the interpreter is slow
generator = torch.Generator().manual_seed(0)
cases = (3, 50, torch.float32), (17, 161, torch.float32), (16, 32, torch.float64), (1, 7, torch.float32)
for P, K, dtype in cases:
    values = torch.rand(P, K, generator=generator, dtype=dtype).clamp(min=torch.finfo(dtype).tiny)
    values[0, 0] = torch.finfo(dtype).tiny
    total = values[:, None].double() + values.double()
    expected = (total * total.log()).sum(-1).triu()
    error = (mixture_kernel.mixture_sums(values).triu() - expected).abs().max() / K
    assert error < (1e-12 if dtype == torch.float64 else 2e-7), (P, K, dtype, error)
"""


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed: it comes with CUDA builds of torch")
def test_sums_are_those_of_float64_and_padding_adds_nothing():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
