"""The Triton kernels without a GPU: what they compute, in Triton's interpreter; what they need, by Triton's compiler.

Against the other roads on a GPU: test_large_maps_gpu.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
ASTSource = pytest.importorskip("triton.compiler").ASTSource
kernels = pytest.importorskip("densessl.propagation._triton")

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def test_kernels_compute_the_equation():
    """In a process of its own: see there."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-rs",
        str(Path(__file__).parents[1] / "oracles" / "interpreted_kernels.py"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(VERSION < (3, 3), reason="Triton's compiler is called in another way")
@pytest.mark.skipif(not PTXAS.exists(), reason="needs ptxas")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("capability", "shared", "dtype", "gamma"),
    [
        (90, 232_448, torch.bfloat16, 1.5),  # H100, H200
        (80, 166_912, torch.bfloat16, 2.0),  # A100
        (80, 101_376, torch.bfloat16, 2.0),  # consumer cards compile alike
        (80, 101_376, torch.float32, 2.0),
    ],
)
def test_kernels_compile_and_fit(monkeypatch, tmp_path, backward, capability, shared, dtype, gamma):
    """With 256 channels, and for the device's shared memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = (kernels._sum_kernel, kernels._slope_kernel)[backward]
    blocks = kernels.blocks_of(dtype, 256, "tf32", shared)[backward]
    fixed = {"GAMMA": gamma, "PRECISION": "tf32", **kernels.sizes(blocks, 256, 256)}
    options = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = {name: "i32" if name in ("count", "width", "depth") else pointer for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name not in fixed}
    source = ASTSource(kernel, types | dict.fromkeys(fixed, "constexpr"), fixed, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert 0 < compiled.metadata.shared <= shared
    assert compiled.asm["cubin"]
