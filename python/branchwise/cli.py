"""The command line: ``branchwise info``, ``demo`` and ``generate``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="branchwise", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, CPU instruction set, CUDA state")

    demo = commands.add_parser("demo", help="plain generate and branchwise side by side on SmolLM2-135M")
    demo.add_argument("--dtype", choices=DTYPES, default="float32")
    demo.add_argument("--max-new-tokens", type=int, default=96)
    demo.add_argument("--no-live", action="store_true", help="print finished texts instead of streaming them")

    generate = commands.add_parser("generate", help="decode a prompt with a local model")
    generate.add_argument("--model", required=True, help="folder of a transformers model")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=256)
    generate.add_argument("--dtype", choices=DTYPES, default="float32")
    generate.add_argument("--drafter", choices=("trie", "prompt_lookup"), default="trie")
    generate.add_argument("--max-nodes", type=int, default=32)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    generate.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    options = parser.parse_args(arguments)
    return {"info": _info, "demo": _demo, "generate": _generate}[options.command](options)


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

    try:
        from .demo import run_demo

        run_demo(
            options.max_new_tokens, getattr(torch, options.dtype), live=not options.no_live and sys.stdout.isatty()
        )
    except ModuleNotFoundError as error:
        print(f"branchwise demo: {error}; pip install 'branchwise[demo]'", file=sys.stderr)
        return 1
    return 0


def _generate(options: argparse.Namespace) -> int:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    from .decoding import TreeSpeculation

    if not os.path.isdir(options.model):
        print(f"branchwise generate: --model must be a folder, got {options.model!r}", file=sys.stderr)
        return 1
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    if options.chat:
        message = [{"role": "user", "content": options.prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(options.prompt, return_tensors="pt")
    spec = TreeSpeculation(options.drafter, options.max_nodes)
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
