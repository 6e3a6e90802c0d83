"""Trains the small masked-diffusion model that the tests, the demo and bench/diffusion.py decode with.

Text: the standard library's sources and the documentation that comes with Python. Vocabulary: 2048 byte pairs, learned
from it. Every step masks tokens of random passages and asks for them, in two ways, so that one set of weights serves
both patterns (card dllm-baselines): block-causal, where a noisy copy of every block sees the clean blocks before it
([x_t | x_0] in one forward), and full, where every token sees every other.

    python examples/train_diffusion.py --minutes 50 --out my-model        # two CPU cores
    python examples/train_diffusion.py --minutes 5 --device cuda --out my-model
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from branchwise.diffusion.model import MaskedDiffusionConfig, MaskedDiffusionLM, block_pattern

PAD, MASK, END = "<pad>", "<mask>", "<end>"


def texts() -> Iterator[str]:
    """The standard library without its tests, file by file, and the language reference."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings"} & set(parts) or path.name[0] == "_":
            continue
        yield path.read_text(encoding="utf-8", errors="ignore")
    yield from topics.values()


def learn_tokenizer(corpus: list[str], size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD, MASK, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, mask_token=MASK, eos_token=END)


def noisy(tokens: Tensor, t: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, n] with each masked with its probability ``t``, and where."""
    masked = torch.rand(tokens.shape, device=tokens.device) < t
    return torch.where(masked, mask_id, tokens), masked


def loss_of(model: MaskedDiffusionLM, tokens: Tensor, blocks: bool, block_size: int) -> Tensor:
    """Cross entropy at the masked tokens over their masking probability: a bound of the negative log-likelihood."""
    B, n = tokens.shape
    device, mask_id = tokens.device, model.config.mask_token_id
    if blocks:
        t = torch.empty(B, n // block_size, device=device).uniform_(0.1, 1).repeat_interleave(block_size, 1)
        x, masked = noisy(tokens, t, mask_id)
        before = block_pattern(n, block_size).to(device)
        own = before & before.T
        sees = torch.cat([torch.cat([own, before & ~own], 1), torch.cat([torch.zeros_like(own), before], 1)])
        ids = torch.cat([x, tokens], 1)
        positions = torch.arange(n, device=device).repeat(2)
    else:
        t = torch.empty(B, 1, device=device).uniform_(0.1, 1).expand(B, n)
        x, masked = noisy(tokens, t, mask_id)
        sees = torch.ones(n, n, dtype=torch.bool, device=device)
        ids, positions = x, torch.arange(n, device=device)
    hidden = model.model(
        ids,
        attention_mask=sees.expand(B, 1, -1, -1),
        position_ids=positions.expand(B, -1),
        use_cache=False,
    ).last_hidden_state[:, :n]
    logits = model.lm_head(hidden[masked]).float()
    loss = torch.nn.functional.cross_entropy(logits, tokens[masked], reduction="none")
    return (loss / t[masked]).sum() / (B * n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for model and tokenizer")
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(0)

    corpus = list(texts())
    tokenizer = learn_tokenizer(corpus, 2048)
    stream = torch.tensor([t for text in corpus for t in [*tokenizer(text).input_ids, tokenizer.eos_token_id]])
    print(f"{len(corpus)} texts, {len(stream):,} tokens, Python {sys.version.split()[0]}", flush=True)
    config = MaskedDiffusionConfig(
        mask_token_id=tokenizer.mask_token_id,
        block_size=8,
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = MaskedDiffusionLM(config).to(args.device).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    # Muon takes less than half the steps of AdamW to the same loss; it is for matrices only.
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.05),
    ]

    begun, step, mean = time.time(), 0, 0.0
    while (done := (time.time() - begun) / (60 * args.minutes)) < 1:
        rate = args.rate * min(1, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        at = torch.randint(len(stream) - args.length, (args.batch,))
        tokens = torch.stack([stream[i : i + args.length] for i in at]).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = loss_of(model, tokens, blocks=step % 3 != 0, block_size=config.block_size)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        mean += (float(loss.detach()) - mean) / min(step + 1, 100)
        if step % 100 == 0:
            print(f"{(time.time() - begun) / 60:5.1f} min  step {step}  loss {mean:.3f}", flush=True)
        step += 1

    model.eval().to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{step} steps, loss {mean:.3f}, written to {args.out}")


if __name__ == "__main__":
    main()
