"""Reports of who wrote which token: nothing of the text is lost, and colours follow the writers."""

import json
import re

import pytest

import branchwise as bw
import tiny
from branchwise.decoding.stats import DecodeStats
from branchwise.report import Provenance, to_html, to_terminal


class Bytes:
    """A tokenizer whose tokens are bytes, so that characters are spread over tokens."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


TEXT = "a < b & ü: €\n\n<script>"


def bytewise(writers):
    ids = list(TEXT.encode())
    return Provenance(ids, [writers[i % len(writers)] for i in range(len(ids))], [""] * len(ids))


@pytest.mark.parametrize("writers", [["small"], ["small", "base"], ["a", "b", "b", "c"]])
def test_the_whole_text_is_shown(writers, tmp_path):
    provenance = bytewise(writers)
    shown = to_terminal(provenance, Bytes())
    assert shown.plain.startswith(TEXT + "\n\n")
    assert sum(provenance.shares.values()) == pytest.approx(1)
    path = tmp_path / "page.html"
    to_html(path, [provenance, provenance], Bytes(), prompts=["why <", "&"], title="t<t")
    page = path.read_text(encoding="utf-8")
    import html

    texts = re.findall(r'<p class="text">((?:<span.*?</span>)+)</p>', page, re.DOTALL)
    assert [html.unescape(re.sub(r"<[^>]*>", "", text)) for text in texts] == [TEXT, TEXT]
    assert "<script>" not in page.replace('<script type="application/json" id="provenance">', "")
    assert "why &lt;" in page and "t&lt;t" in page
    data = re.search(r'id="provenance">(.*?)</script>', page, re.DOTALL).group(1)
    assert json.loads(data)[1] == {"tokens": provenance.tokens, "writers": provenance.writers}
    assert not re.search(r'(src|href)="', page)  # needs no other file


def test_colours_follow_writers():
    provenance = Provenance([65, 66, 67, 68], ["small", "base", "base", "base"], ["", "", "", ""])
    shown = to_terminal(provenance, Bytes())
    spans = {shown.plain[span.start : span.end]: span.style for span in shown.spans}
    assert spans["A"] != spans["BCD"] and spans["BCD"] in str(spans["base 75%  "])


def test_provenance_of_every_decoder():
    base, small = tiny.model("llama"), tiny.model("qwen3")
    ids, mask = tiny.prompts(2, 0)
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    scores = iter([9.0, 0.0] * 50)
    steps = bw.StepSpeculative(small, lambda c, s: next(scores), lambda step: len(step) == 4)
    out = base.generate(ids, custom_generate=steps, **options)
    provenance = Provenance.of(steps.traces[0])
    assert provenance.tokens == out[0, ids.shape[1] :][: len(provenance.tokens)].tolist()
    assert (
        set(provenance.writers) == {"small", "base"} and "4 tokens of the small model rejected" in provenance.notes[4]
    )
    reverse = bw.ReverseSpeculative(small, seed=0)
    out = base.generate(ids, custom_generate=reverse, **options)
    provenance = Provenance.of(reverse.traces[1])
    assert provenance.tokens == out[1, ids.shape[1] :][: len(provenance.tokens)].tolist()
    assert set(provenance.writers) <= {"teacher", "student"} and "student's p" in provenance.notes[0]
    cascade = bw.BigLittle(small, fallback=0.0, rollback=1e9)
    out = base.generate(ids, custom_generate=cascade, **options)
    provenance = Provenance.of(cascade.stats, out[0, ids.shape[1] :].tolist())
    assert provenance.writers.count("draft") == sum(cascade.stats.accepted_flags[0]) > 0


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="writers must have one entry per token, 2, got 1"):
        Provenance([1, 2], ["a"], ["", ""])
    with pytest.raises(ValueError, match="prompts must be as many as texts, 1, got 2"):
        to_html(tmp_path / "x.html", [bytewise(["a"])], Bytes(), prompts=["a", "b"])
    assert Provenance.of(DecodeStats(accepted_flags=[[]])).shares == {}
