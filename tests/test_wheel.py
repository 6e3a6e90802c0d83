"""The wheel in a clean virtual environment without a compiler. Slow: it installs torch. `make test-wheel` runs it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent

USE = """
import shutil, torch, transformers as tf, branchwise as bw
assert shutil.which("g++") is None and shutil.which("nvcc") is None
assert "site-packages" in bw.__file__, bw.__file__
config = tf.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
model = tf.LlamaForCausalLM(config).eval()
ids = torch.tensor([[1, 5, 9, 5, 9, 5]])
plain = model.generate(ids, max_new_tokens=20, do_sample=False)
assert torch.equal(plain, model.generate(ids, max_new_tokens=20, do_sample=False, custom_generate=bw.TreeSpeculation()))
print("works")
"""


def run(*command, **environment):
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_wheel_works_without_a_compiler(tmp_path):
    import torch
    import transformers

    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # In the folder that `make` builds in: half of the time would go into compiling the same sources again.
    reuse = [f"-Cbuild-dir={ROOT / 'build/edit'}", "-Ccmake.define.BRANCHWISE_EMULATE=OFF"]
    run(sys.executable, *pip, "wheel", "--no-build-isolation", "--no-deps", *reuse, "-w", tmp_path, ROOT, PATH=path)
    (wheel,) = tmp_path.glob("branchwise-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "branchwise/libbranchwise_cpu.so" in names and "branchwise/py.typed" in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".cuh")) or "emulated" in name]

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    torch_version = torch.__version__.split("+")[0]
    run(python, *pip, "install", f"torch=={torch_version}", f"transformers=={transformers.__version__}", "numpy")
    run(python, *pip, "install", "--no-deps", wheel)
    assert run(python, "-c", USE, PATH=str(python.parent), PYTHONPATH="").strip().endswith("works")
    assert "cpu isa" in run(python.parent / "branchwise", "info", PATH=str(python.parent))
