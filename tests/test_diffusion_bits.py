"""A state in a forward of many, bit for bit as in one of its own; so texts are equal in 16 bits, too."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from branchwise.attention import use_attention
from branchwise.diffusion import BlockDecoder, FreeDave, spec_of
from branchwise.diffusion.engine import PageEngine, TreeEngine
from branchwise.diffusion.window import Kind, Window
from branchwise.layers import InvariantLinears
from test_diffusion import MASK, PAIRS, RULES, V, decode, length_of, model, prompts
from test_diffusion_trained import decode as decode_trained
from test_diffusion_trained import load

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@torch.no_grad()
def cast(m, dtype):
    """A copy of the model, with linear layers whose rows do not depend on each other in fp32, too."""
    made = copy.deepcopy(m).to(dtype)
    if dtype == torch.float32:
        InvariantLinears(made).__enter__()
    return made


class Logits:
    def read(self, row, window, logits):
        return logits.clone()


def windows_of(states, block, held):
    """All states in one window, and each in one of its own, of a text whose first ``held`` tokens are kept."""
    common = {"start": held, "block": block, "mask_id": MASK, "current": held + block, "limit": 10**6, "held": held}
    whole = Window.of(Kind.VERIFY, states, **common, ahead_below=block)
    alone = [Window.of(Kind.VERIFY, state[None], **common, ahead_below=block) for state in states]
    return whole, alone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block, held", [(4, 12), (5, 20), (8, 304), (96, 96)])
@torch.no_grad()
def test_a_state_has_the_bits_of_a_forward_of_its_own(block, held, dtype):
    """Of two rows with other texts and lengths: what is kept, a block that is not yet, and states of two more."""
    m = cast(model("block_causal", block, max_position_embeddings=1024), dtype)
    g = torch.Generator().manual_seed(1)
    prefixes = [torch.randint(3, V, (n,), generator=g) for n in (held, held - block)]
    windows = []
    for prefix in prefixes:
        states = torch.randint(3, V, (1, 3 * block), generator=g).numpy().repeat(4, 0)
        states[0, block + 1 : block + 3] = states[:, -block:] = MASK  # one that does not look at the last block
        states[1, block + 1] = states[2, block + 2] = states[3, -block + 1] = 7
        windows.append(windows_of(states, block, len(prefix)))

    def differing(kind):
        """Values of all states' logits that are others among states of two rows than alone."""
        found = 0
        together = kind(m, spec_of(m), 2, 2048)
        together.prefill(prefixes, block)
        outs = together.ask([0, 1], [whole for whole, _ in windows], Logits())
        for (whole, alone), prefix, out in zip(windows, prefixes, outs, strict=True):
            single = kind(m, spec_of(m), 1, 1024)
            single.prefill([prefix], block)
            number = np.cumsum(whole.wanted.numpy()) - 1  # of a node's logits
            for i, window in enumerate(alone):
                own = single.ask([0], [window], Logits())[0]
                at = torch.nonzero((window.nodes[0] >= 0) & (whole.nodes[i] >= 0)).flatten()
                at = at[window.wanted[window.nodes[0, at]]]
                mine = (np.cumsum(window.wanted.numpy()) - 1)[window.nodes[0, at]]
                theirs = number[whole.nodes[i, at]]
                assert len(at) > 0 and torch.isfinite(own).all()
                torch.testing.assert_close(out[theirs], own[mine], atol=0.1, rtol=0.1)
                found += int((out[theirs] != own[mine]).sum())
        return found

    with use_attention(m):
        assert differing(PageEngine) == 0
        if dtype is torch.float32 and held > 256:  # short sums may agree, and 16 bits round differences away
            assert differing(TreeEngine) > 0, "one mask for all would do"


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attention, cache", PAIRS)
def test_texts_are_those_of_static_decoding_in_16_bits(attention, cache, rule, dtype):
    """In a batch, and of rows alone; under the full pattern, rows of a batch have states of different widths."""
    for block in (4, 5) if attention == "block_causal" else (4,):
        m = cast(model(attention, block), dtype)
        ids, mask = prompts()
        options = {"block_length": length_of(attention), "cache": cache}
        wanted = decode(m, BlockDecoder(RULES[rule], **options), ids, mask)
        for draft_length in (2, 8, 16):
            dave = FreeDave(RULES[rule], draft_length, least_chance=0.0, **options)
            assert torch.equal(decode(m, dave, ids, mask), wanted)
        for row in range(3):
            own = mask[row].bool()
            alone = decode(m, FreeDave(RULES[rule], **options), ids[row : row + 1, own], None)
            assert torch.equal(alone[0, -19:], wanted[row, -19:])


@pytest.mark.parametrize("attention, cache", PAIRS)
def test_so_are_those_of_the_trained_model(attention, cache):
    m, ids, mask = load(attention)
    m, many = cast(m, torch.bfloat16), {"max_new_tokens": 96 if attention == "block_causal" else 48}
    wanted = decode_trained(m, BlockDecoder(cache=cache), ids, mask, **many)
    for options in ({}, {"draft_length": 16, "least_chance": 0.0}, {"drafts": "chain"}):
        assert torch.equal(decode_trained(m, FreeDave(cache=cache, **options), ids, mask, **many), wanted)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0}
    sampled = decode_trained(m, BlockDecoder(cache=cache, seed=3), ids, mask, **options)
    assert torch.equal(decode_trained(m, FreeDave(cache=cache, seed=3), ids, mask, **options), sampled)
