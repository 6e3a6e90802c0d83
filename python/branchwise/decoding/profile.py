"""What a controller learned, kept in a file per model, machine and kind of task."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

_VERSION = 1


def model_key(model: PreTrainedModel) -> str:
    """Architecture, dtype, and a digest of the configuration, which tells sizes apart; not the weights."""
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=6).hexdigest()
    return f"{type(model).__name__} {str(model.dtype).removeprefix('torch.')} {digest}"


def machine_key() -> str:
    """CPU and number of threads."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    return f"{name}, {torch.get_num_threads()} threads"


class Profile:
    """A JSON file of what was learned. Reading a file that does not exist gives an empty profile.

    Args:
        path: of the file.

    Raises:
        ValueError: the file is not a profile, or one of another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._entries: dict[str, Any] = {}
        if not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text())
            version, self._entries = content["version"], dict(content["entries"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"path must name a profile written by branchwise tune, got {self.path}") from error
        if version != _VERSION:
            raise ValueError(f"the profile {self.path} has version {version}; this branchwise reads {_VERSION}")

    def find(self, model: PreTrainedModel, task: str) -> Any | None:
        """What was learned for this model and task on this machine; or for the task "", which stands for all."""
        for tag in (task, ""):
            entry = self._entries.get(self._key(model, tag))
            if entry is not None:
                return entry
        return None

    def put(self, model: PreTrainedModel, task: str, learned: Any) -> None:
        """Keeps it, and writes the file; a reader never sees half of it."""
        self._entries[self._key(model, task)] = learned
        text = json.dumps({"version": _VERSION, "entries": self._entries}, indent=1)
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text(text)
        beside.replace(self.path)

    @staticmethod
    def _key(model: PreTrainedModel, task: str) -> str:
        return " | ".join((model_key(model), machine_key(), task))
