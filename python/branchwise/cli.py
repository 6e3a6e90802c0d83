"""The command line: ``branchwise info``, ``demo``, ``generate`` and ``tune``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

DRAFTERS = ("auto", "jacobi", "lookahead", "none", "prompt_lookup", "suffix", "token_recycling", "trie")
DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="branchwise", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, CPU instruction set, CUDA state")

    demo = commands.add_parser("demo", help="plain generate and branchwise side by side on SmolLM2-135M")
    demo.add_argument("--dtype", choices=DTYPES, default="float32")
    demo.add_argument("--max-new-tokens", type=int, default=96)
    demo.add_argument("--diffusion", action="store_true", help="a small masked-diffusion model instead: FreeDave")
    demo.add_argument("--model", help="with --diffusion: folder of a model of examples/train_diffusion.py")
    demo.add_argument("--no-live", action="store_true", help="print finished texts instead of streaming them")

    generate = commands.add_parser("generate", help="decode a prompt with a local model")
    generate.add_argument("--model", required=True, help="folder of a transformers model")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=256)
    generate.add_argument("--dtype", choices=DTYPES, default="float32")
    generate.add_argument("--drafter", choices=DRAFTERS, default="auto")
    generate.add_argument("--profile", help='what "branchwise tune" learned, for --drafter auto')
    generate.add_argument("--task", default="", help="which part of the profile")
    generate.add_argument("--max-nodes", type=int, default=32)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    generate.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")

    tune = commands.add_parser("tune", help="measure costs and acceptance on your prompts and write a profile")
    tune.add_argument("--model", required=True, help="folder of a transformers model")
    tune.add_argument("--prompts", required=True, help="text file, one prompt per line, or a JSON list of strings")
    tune.add_argument("--profile", required=True, help="JSON file to write; other entries in it stay")
    tune.add_argument("--task", default="", help="a tag for this kind of prompts; none stands for all")
    tune.add_argument("--max-new-tokens", type=int, default=64)
    tune.add_argument("--dtype", choices=DTYPES, default="float32")
    tune.add_argument("--chat", action="store_true", help="wrap the prompts in the model's chat template")
    options = parser.parse_args(arguments)
    return {"info": _info, "demo": _demo, "generate": _generate, "tune": _tune}[options.command](options)


def _info(options: argparse.Namespace) -> int:
    import platform

    import torch
    import transformers

    from . import __version__, ops

    chosen, best = ops.cpu_isa()
    forced = " (BRANCHWISE_CPU_ISA)" if os.environ.get("BRANCHWISE_CPU_ISA") else ""
    available = ", ".join(ops.ISA_LEVELS[: ops.ISA_LEVELS.index(best) + 1])
    if ops.CUDA_LOADED:
        cuda = f"loaded, {torch.cuda.device_count()} device(s)"
    elif not (ops.LIBRARY_DIR / "libbranchwise_cuda.so").exists():
        cuda = "not built (no nvcc at build time, or BRANCHWISE_CUDA=OFF)"
    else:
        cuda = "built, not loaded: this torch has no CUDA"
    print(f"branchwise    {__version__}")
    print(f"python        {platform.python_version()}")
    print(f"torch         {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"transformers  {transformers.__version__}")
    print(f"cpu isa       {chosen}{forced}; available: {available}")
    print(f"cuda library  {cuda}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    import torch

    live = not options.no_live and sys.stdout.isatty()
    if options.model and not options.diffusion:
        print("branchwise demo: --model goes with --diffusion", file=sys.stderr)
        return 1
    if options.diffusion and options.dtype != "float32":
        print(f"branchwise demo: --diffusion runs in float32, got --dtype {options.dtype}", file=sys.stderr)
        return 1
    try:
        if options.diffusion:
            from .demo_diffusion import run_diffusion_demo

            run_diffusion_demo(options.model, options.max_new_tokens, live)
        else:
            from .demo import run_demo

            run_demo(options.max_new_tokens, getattr(torch, options.dtype), live)
    except FileNotFoundError as error:
        print(f"branchwise demo: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"branchwise demo: {error}; pip install 'branchwise[demo]'", file=sys.stderr)
        return 1
    return 0


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer of --model; exits with a message if it is no folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not os.path.isdir(options.model):
        sys.exit(f"branchwise {options.command}: --model must be a folder, got {options.model!r}")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval(), tokenizer


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _tune(options: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    import numpy as np

    from .decoding import Auto, TreeSpeculation
    from .decoding.tree_size import cost_model

    text = Path(options.prompts).read_text()
    prompts = json.loads(text) if options.prompts.endswith(".json") else [line for line in text.splitlines() if line]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        print(f"branchwise tune: --prompts must hold at least one prompt, got {options.prompts!r}", file=sys.stderr)
        return 1
    model, tokenizer = _load(options)
    auto = Auto(profile=options.profile, task=options.task)
    spec = TreeSpeculation(auto)
    emitted = forwards = 0
    for prompt in prompts:
        inputs = _encode(tokenizer, prompt, options.chat)
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            custom_generate=spec,
        )
        emitted, forwards = emitted + spec.stats.emitted, forwards + spec.stats.row_forwards
    auto.save(options.profile, model)
    print(f"{len(prompts)} prompts, {emitted / forwards:.2f} tokens per forward")
    for name, record in auto.records.items():
        print(
            f"{name:16s} asked {record.asked:5d} times, {record.accepted} of {record.drafted} nodes accepted, "
            f"{record.seconds * 1e3:.2f} ms per round, {'pays' if record.gain >= 0 else 'does not pay'}"
        )
    sizes = np.array([1, 2, 4, 8, 16, 32])
    times = cost_model(model).seconds(sizes) * 1e3
    print("forward of " + ", ".join(f"{n}: {t:.1f} ms" for n, t in zip(sizes, times, strict=True)))
    print(f"written to {options.profile}")
    return 0


def _generate(options: argparse.Namespace) -> int:
    from transformers import TextStreamer

    from .decoding import Auto, TreeSpeculation

    model, tokenizer = _load(options)
    inputs = _encode(tokenizer, options.prompt, options.chat)
    drafter = Auto(profile=options.profile, task=options.task) if options.drafter == "auto" else options.drafter
    spec = TreeSpeculation(drafter, options.max_nodes)
    sampling: dict[str, object] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature}
    try:
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=options.max_new_tokens,
            custom_generate=spec,
            streamer=TextStreamer(tokenizer, skip_prompt=True),
            **sampling,
        )
    except ValueError as error:
        print(f"branchwise generate: {error}", file=sys.stderr)
        return 1
    stats = spec.stats
    seconds = stats.seconds_prefill + stats.seconds_draft + stats.seconds_forward + stats.seconds_verify
    print(
        f"{stats.emitted} tokens in {seconds:.1f} s ({stats.emitted / seconds:.1f} tokens/s), "
        f"{stats.forwards} forwards, {stats.tokens_per_forward:.2f} tokens per forward, "
        f"{stats.accepted} of {stats.drafted} drafted nodes accepted",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
