"""The file of candidates while several processes write it: a part each, put together in the order of the prompts.

Processes are those of `accelerate launch` or `torchrun` (RANK, WORLD_SIZE, LOCAL_RANK in the environment), with a
process group of their own or the one that is there already.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from rewards.commandline import ConfigError
from rewards.files import write_atomically

# One process may have far more to do than another.
_LONGEST_WAIT = timedelta(days=7)


@dataclass
class Processes:
    """Which of how many processes this is."""

    rank: int
    count: int
    local_rank: int
    _joined: bool = False  # whether the process group is one that was made here

    @classmethod
    def here(cls) -> "Processes":
        """From the launcher's environment; a single process without one."""
        rank, count, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        return cls(rank, count, local)

    def device(self) -> str:
        """This process's own GPU, if there are any."""
        return f"cuda:{self.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"

    def wait(self) -> None:
        """Until all have come here."""
        if self.count == 1:
            return
        distributed: Any = torch.distributed
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
            self._joined = True
        # A group of its own: the usual one may give up after ten minutes.
        group = distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        distributed.barrier(group=group)
        distributed.destroy_process_group(group)

    def leave(self) -> None:
        """Wait for the others a last time, and let go of a process group that was made for that."""
        self.wait()
        if self._joined:
            torch.distributed.destroy_process_group()
            self._joined = False


class CandidateFile:
    """Rows of a run by prompt; a line that a kill cut short counts for nothing.

    Args:
        path: The .jsonl file.
        prompt_ids: All prompts of the run, in order.
    """

    def __init__(self, path: str | Path, prompt_ids: Sequence[str]) -> None:
        self.path = Path(path)
        self._prompt_ids = list(prompt_ids)

    def gather(self) -> list[dict[str, Any]]:
        """Put what there is, parts included, into the one file; returns its rows. For one process only.

        Raises:
            ConfigError: The file holds other prompts.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = self._parts()
        rows = {row["prompt_id"]: row for path in (self.path, *parts) for row in _read(path)}
        if not rows.keys() <= set(self._prompt_ids):
            raise ConfigError(
                f"`output` {self.path} holds candidates of other prompts. Choose another file or remove it."
            )
        ordered = [rows[prompt_id] for prompt_id in self._prompt_ids if prompt_id in rows]
        if rows:
            write_atomically(self.path, "".join(map(_line, ordered)).encode())
        for part in parts:
            part.unlink()
        return ordered

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the one file."""
        return list(_read(self.path))

    def write_part(self, rank: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append the rows of a unit of work to this process's part."""
        with self._part(rank).open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, rows)))

    def _part(self, rank: int | str) -> Path:
        return self.path.with_name(f"{self.path.name}.part-{rank}")

    def _parts(self) -> list[Path]:
        return sorted(p for p in self.path.parent.iterdir() if p.name.startswith(self._part("").name))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read(path: Path) -> Iterable[dict[str, Any]]:
    if not path.is_file():
        return
    # Not splitlines(): text may hold U+2028 and its like, which JSON does not escape.
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "prompt_id" in row:
            yield row
