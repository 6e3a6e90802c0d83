"""How launches are laid out, as plain functions, and what the compiled kernels are made of."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from branchwise.ops._load import LIBRARY_DIR

LIBRARY = LIBRARY_DIR / "libbranchwise_cuda.so"
SHARED_A100, SHARED_H200 = 163 * 1024, 227 * 1024  # bytes a block may have


class Plan(NamedTuple):
    head_dim: int
    warps_m: int
    warps_k: int
    rows: int
    blocks: int
    most_splits: int
    splits: int
    shared_bytes: int
    unit_floats: int


@pytest.fixture
def plan(emulator):
    def ask(Hkv=8, G=4, T=1, D=128, places=4096, per_token=False, aligned=True, eight_bits=False, by_stretch=0):
        return Plan(*emulator.ops.plan_attention(Hkv, G, T, D, places, per_token, aligned, eight_bits, by_stretch))

    return ask


@pytest.mark.parametrize("D", [8, 64, 72, 96, 128, 136, 256])
@pytest.mark.parametrize(("G", "T"), [(1, 1), (4, 4), (7, 3), (4, 16), (8, 64), (4, 100_000)])
def test_every_row_has_a_block_that_fits(D, G, T, plan):
    p = plan(D=D, G=G, T=T)
    assert p.head_dim >= D and p.rows * p.blocks >= G * T > p.rows * (p.blocks - 1)
    assert p.warps_m * p.warps_k == 4 and p.rows == 16 * p.warps_m
    assert p.shared_bytes <= SHARED_A100
    if p.head_dim <= 128 and p.rows <= 32:
        assert 2 * (p.shared_bytes + 1024) <= SHARED_H200 + 1024  # two blocks on an SM, 1 KB of the system's each


def test_plain_kernel_where_matrices_cannot(plan):
    assert plan(aligned=False).head_dim == plan(D=264).head_dim == 0
    assert plan(aligned=False).rows == 4


def test_lists_per_token_keep_to_their_token(plan):
    assert plan(G=9, T=5, per_token=True).blocks == 5
    assert plan(G=40, T=5, per_token=True).blocks == 5
    assert plan(G=70, T=5, per_token=True).blocks == 10


@pytest.mark.parametrize("T", [1, 5, 64])
def test_splits(T, plan):
    """At least four tiles each, enough of them for the chip, and as many for every cache size."""
    p = plan(T=T, places=1 << 20)
    assert p.splits == p.most_splits and p.splits * 8 * p.blocks >= 256
    assert plan(T=T, places=256).splits == 1 and plan(T=T, places=257).splits == 2
    assert {plan(T=T, places=n).most_splits for n in (1, 1000, 10**6)} == {p.most_splits}
    assert plan(T=100_000).splits == 1  # a long prompt has blocks enough


def test_caches_in_e4m3(plan):
    assert [plan(D=D, eight_bits=True).head_dim for D in (48, 64, 96, 128, 144)] == [64, 64, 128, 128, 0]
    for D, T in ((64, 1), (128, 16), (128, 64)):
        p = plan(D=D, T=T, eight_bits=True)
        assert p.shared_bytes < plan(D=D, T=T).shared_bytes
        joined = 4 * 64 * (p.head_dim + 10)  # what the warps leave there in the end
        assert p.rows * p.head_dim * 2 + joined < p.shared_bytes


@pytest.mark.parametrize("D", [64, 128, 256])
def test_paths_have_one_form_for_any_rows(D, plan):
    """A row's bits must not depend on how many there are: the same share of warps, and fixed stretches of places."""
    forms = set()
    for T in (1, 4, 16, 64, 5000):
        p = plan(D=D, T=T, by_stretch=1 << 20)
        assert p.rows * p.blocks >= 4 * T > p.rows * (p.blocks - 1)
        assert p.unit_floats == p.rows * (D + 2)
        forms.add((p.warps_m, p.warps_k, p.shared_bytes))
    assert len(forms) == 1
    # Places 0 to 4095 in stretches of 256, those behind in stretches of 1024; no more than a window touches.
    splits = {places: plan(places=places, by_stretch=1 << 20).splits for places in (1, 256, 257, 4096, 4097, 5121)}
    assert splits == {1: 1, 256: 1, 257: 2, 4096: 16, 4097: 17, 5121: 18}
    assert plan(places=1 << 17, by_stretch=3).splits == 3


# ---- the compiled library ----

# Of an architecture. Per dtype three forms of three head dims and two of the largest, and e4m3.
MATRIX_KERNELS = 2 * (3 * 3 + 2) + 2 * 3


@pytest.fixture(scope="session")
def cuobjdump():
    if not LIBRARY.exists():
        pytest.skip("libbranchwise_cuda was not built: no nvcc")
    folders = [str(Path(p) / "nvidia/cu13/bin") for p in sys.path if (Path(p) / "nvidia/cu13/bin").exists()]
    path = os.pathsep.join([*folders, os.environ["PATH"]])
    if shutil.which("cuobjdump", path=path) is None:
        pytest.skip("no cuobjdump")

    def run(*args):
        command = ["cuobjdump", *args, str(LIBRARY)]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
        ).stdout

    return run


@pytest.fixture(scope="session", params=["sm_80", "sm_90a"])
def sass(request, cuobjdump):
    """An architecture, and the text of each kernel, by its name."""
    functions = re.split(r"\n\s+Function : ", cuobjdump("-sass", "-arch", request.param))[1:]
    return request.param, {text.split("\n")[0]: text for text in functions}


def test_no_kernel_spills(cuobjdump):
    text = cuobjdump("--dump-resource-usage")
    kernels = re.findall(r"Function (\S+):\n\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert {"sm_80", "sm_90a"} <= set(re.findall(r"arch = (sm_\w+)", text))
    assert sum("16attention_kernel" in name for name, *_ in kernels) == 2 * MATRIX_KERNELS
    for name, _, stack, local in kernels:
        if "rerotate" in name:
            continue  # not hot; the reduction of cos(double) keeps a table on the stack
        assert (int(stack), int(local)) == (0, 0), f"{name} spills: {stack} bytes of stack"


def test_linear_kernels_use_tensor_cores_and_copies(sass):
    matrix = [text for name, text in sass[1].items() if "20matrix_linear_kernel" in name]
    assert len(matrix) == 2 * 3
    for text in matrix:
        assert re.search(r"HMMA\.16816\.F32", text) and "LDSM.16.M88.4" in text
        assert "LDGSTS.E.BYPASS.128" in text and not re.search(r"\b(LDL|STL)\b", text)


def test_matrix_kernels_use_tensor_cores_and_copies(sass):
    """Products on tensor cores, operands by ldmatrix, tiles by asynchronous 16-byte copies past the L1."""
    arch, functions = sass
    matrix = {name: text for name, text in functions.items() if "16attention_kernel" in name}
    assert len(matrix) == MATRIX_KERNELS
    for name, text in matrix.items():
        unpacks = "E4m3" in name and arch == "sm_90a"
        assert unpacks == ("E4M3.UNPACK" in text)
        assert re.search(r"HMMA\.16816\.F32", text) and "LDSM.16.M88.4" in text and "LDSM.16.MT88.4" in text
        assert "LDGSTS.E.BYPASS.128" in text and not re.search(r"\b(LDL|STL)\b", text)


def test_every_op_has_a_kernel_on_both(emulator):
    ops = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("branchwise::")}
    assert len(ops) > 25
    for op in ops - {"cpu_isa"}:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"branchwise::{op}", "CPU"), op
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"branchwise_emulated::{op}", "CPU"), op
