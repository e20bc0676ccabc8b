"""The funnel: how many models, versions and images went in, how many each rule removed, how many came out."""

from dataclasses import dataclass, field
from typing import Any

MAX_EXAMPLES = 3


@dataclass
class Stage:
    """Counts of one kind of thing. `entered - sum(removed) == left` always holds, by construction."""

    entered: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """How many were removed by no rule."""
        return self.entered - sum(self.removed.values())


class Funnel:
    """Counts per stage (`models`, `versions`, `images`), mergeable and JSON-able."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}

    def enter(self, stage: str, count: int = 1) -> None:
        """Count things that reach a stage."""
        self._stage(stage).entered += count

    def remove(self, stage: str, rule: str, example: Any = None) -> None:
        """Count one thing removed by a rule; the first few examples are kept, shortened."""
        counts = self._stage(stage)
        counts.removed[rule] = counts.removed.get(rule, 0) + 1
        examples = counts.examples.setdefault(rule, [])
        if example is not None and len(examples) < MAX_EXAMPLES:
            examples.append(str(example)[:120])

    def merge(self, other: "Funnel") -> None:
        """Add another funnel's counts to this one."""
        for name, theirs in other.stages.items():
            ours = self._stage(name)
            ours.entered += theirs.entered
            for rule, count in theirs.removed.items():
                ours.removed[rule] = ours.removed.get(rule, 0) + count
            for rule, examples in theirs.examples.items():
                kept = ours.examples.setdefault(rule, [])
                kept.extend(examples[: MAX_EXAMPLES - len(kept)])

    def to_dict(self) -> dict[str, Any]:
        """JSON form: per stage `in`, `removed` (rule -> count), `out` and `examples`."""
        return {
            name: {"in": s.entered, "removed": s.removed, "out": s.left, "examples": s.examples}
            for name, s in self.stages.items()
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Funnel":
        """The inverse of `to_dict`."""
        funnel = cls()
        for name, stage in value.items():
            funnel.stages[name] = Stage(stage["in"], dict(stage["removed"]), dict(stage["examples"]))
        return funnel

    def to_markdown(self, explanations: dict[str, str] | None = None) -> str:
        """One table per stage, rules in the order in which they were tried first."""
        parts = []
        for name, stage in self.stages.items():
            lines = [f"### {name.capitalize()}", "", "| rule | removed | share | meaning |", "|---|---:|---:|---|"]
            lines.append(f"| *in* | {stage.entered:,} | | |")
            for rule, count in stage.removed.items():
                share = count / stage.entered if stage.entered else 0.0
                lines.append(f"| {rule} | −{count:,} | {share:.1%} | {(explanations or {}).get(rule, '')} |")
            lines.append(f"| **out** | **{stage.left:,}** | | |")
            parts.append("\n".join(lines))
        return "\n\n".join(parts) + "\n"

    def _stage(self, name: str) -> Stage:
        return self.stages.setdefault(name, Stage())
