"""Gates of the build: symbols, harmless import, instruction-set override, the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from branchwise import ops

LIBRARIES = sorted(ops.LIBRARY_DIR.glob("libbranchwise_*.so"))


def python(code, **environment):
    """Runs code in a fresh interpreter; returns what it prints."""
    result = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout + result.stderr


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_only_the_stable_abi_is_needed(library):
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch" in symbols or "torch_" in symbols, "nm printed no torch symbol: is this test looking at all?"
    # Itanium mangling of at::... and c10::...
    assert not re.findall(r"_ZNK?(?:2at|3c10)\S*|_ZT[ISV]N?(?:2at|3c10)\S*", symbols)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_abi_audit(library):
    audit = Path(sys.executable).parent / "torch-abi-audit"
    if not audit.exists():
        pytest.skip("torch-abi-audit is not installed")
    out = subprocess.run([audit, library], capture_output=True, text=True, check=True).stdout
    assert re.search(r"Torch ABI: +STABLE\n *Min torch: +2\.11\.0", out), out


def test_kernels_share_no_inline_function_between_isa_levels():
    """A weak symbol compiled at two levels would let the linker keep the copy with the wrong instructions."""
    build = Path(__file__).parent.parent / "build"
    # Sanitized objects are never shipped, and are compiled with less inlining.
    objects = [path for path in build.glob("**/kernels_*.dir/**/*.o") if "sanitize" not in path.parts]
    if not objects:
        pytest.skip("no object files beside the sources")
    for path in objects:
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        assert path.name.replace(".cpp.o", "s") in symbols, (
            f"{path} lacks its kernel table: is this test looking at all?"
        )
        assert not re.findall(r"^[0-9a-f]* [WVu] .*", symbols, re.M)


def test_import_changes_nothing():
    code = """
import json, sys
import torch, transformers
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
def state():
    return [sorted(AttentionInterface().valid_keys()), sorted(masks.keys()), torch.get_num_threads(),
            str(torch.get_default_dtype()), torch.is_grad_enabled(), transformers.GenerationMixin.generate.__qualname__,
            id(transformers.GenerationMixin.generate), len(__import__('warnings').filters)]
before = state()
import branchwise, branchwise.cli, branchwise.generate
from branchwise import TreeSpeculation, KVStore, ops
TreeSpeculation()
print(json.dumps([before == state(), 'torch.utils.cpp_extension' in sys.modules]))
"""
    assert json.loads(python(code).splitlines()[-1]) == [True, False]


def test_plain_import_is_lazy():
    assert python("import sys, branchwise; print('torch' in sys.modules, branchwise.__version__)").startswith("False ")


def test_isa_override():
    code = "from branchwise import ops; print(*ops.cpu_isa())"
    best = python(code, BRANCHWISE_CPU_ISA="").split()[1]
    for level in ops.ISA_LEVELS[: ops.ISA_LEVELS.index(best) + 1]:
        assert python(code, BRANCHWISE_CPU_ISA=level).split() == [level, best]
    assert "must be one of baseline, avx2" in python(code, BRANCHWISE_CPU_ISA="sse9")
    with pytest.raises(ValueError, match="level must be one of baseline"):
        ops.set_cpu_isa("mmx")


def test_info():
    out = subprocess.run(
        [sys.executable, "-m", "branchwise.cli", "info"], capture_output=True, text=True, check=True
    ).stdout
    for word in (
        "branchwise    0.",
        f"torch         {torch.__version__}",
        "transformers  ",
        "cpu isa       ",
        "cuda library  ",
    ):
        assert word in out


def test_generate_command(tmp_path):
    """A saved tiny model and tokenizer; the text must be plain greedy's."""
    import tiny
    from test_tree_speculation import letter_tokenizer

    tiny.model("llama").save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "branchwise.cli", "generate", "--model", str(tmp_path), "--max-new-tokens", "12"]
    result = subprocess.run([*command, "--prompt", "hello"], capture_output=True, text=True, check=False)
    ids = letter_tokenizer()("hello", return_tensors="pt").input_ids
    expected = tiny.model("llama").generate(ids, max_new_tokens=12, do_sample=False)
    assert letter_tokenizer().decode(expected[0, ids.shape[1] :]) in result.stdout, result.stderr
    assert "tokens per forward" in result.stderr
    missing = subprocess.run([*command[:5], "/nowhere", "--prompt", "x"], capture_output=True, text=True, check=False)
    assert missing.returncode == 1 and "--model must be a folder, got '/nowhere'" in missing.stderr


def test_tune_command(tmp_path):
    """Writes a profile that generate starts from."""
    import tiny
    from test_tree_speculation import letter_tokenizer

    model, profile, prompts = tmp_path / "model", tmp_path / "profile.json", tmp_path / "prompts.txt"
    tiny.model("llama").save_pretrained(model)
    letter_tokenizer().save_pretrained(model)
    prompts.write_text("hello\nworld\n")
    branchwise = [sys.executable, "-m", "branchwise.cli"]
    tune = [*branchwise, "tune", "--model", str(model), "--profile", str(profile), "--task", "letters"]
    result = subprocess.run([*tune, "--prompts", str(prompts)], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and profile.exists(), result.stderr
    for words in ("2 prompts, ", "tokens per forward", "Suffix ", "TokenRecycling ", "forward of 1: "):
        assert words in result.stdout
    use = ["--model", str(model), "--prompt", "hello", "--profile", str(profile), "--task", "letters"]
    result = subprocess.run([*branchwise, "generate", *use], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    prompts.write_text("")
    result = subprocess.run([*tune, "--prompts", str(prompts)], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "--prompts must hold at least one prompt" in result.stderr
