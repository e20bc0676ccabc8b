"""Plans: what Automatic T2I comes to for a chat, and how it came to that (ChatGen Sec. 3.2)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rollouts.api import APICall
from rollouts.catalog import Catalog

StepName = Literal["prompt", "model", "arguments"]
STEPS: tuple[StepName, ...] = ("prompt", "model", "arguments")


@dataclass(frozen=True)
class Step:
    """One stage of a plan.

    Attributes:
        name: Which.
        raw: What the policy said: text, the names it prefers, or its values.
        notes: What was put right, or taken from elsewhere.
        seconds: Wall time, its share of the batch's.
    """

    name: StepName
    raw: Any
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Everything that is needed to draw what a chat asks for. Always a valid one: what a policy got wrong is replaced.

    Attributes:
        prompt, negative_prompt: For the model.
        model: Name in the catalogue.
        arguments: sampler, steps, cfg_scale, width, height, clip_skip.
        trail: The steps, in order.
    """

    prompt: str
    negative_prompt: str
    model: str
    arguments: Mapping[str, Any]
    trail: tuple[Step, ...] = field(default=())

    @property
    def notes(self) -> tuple[str, ...]:
        """Of all steps."""
        return tuple(note for step in self.trail for note in step.notes)

    def call(self, catalog: Catalog) -> APICall:
        """The plan as a T2I API call."""
        return plan_call(self.model, self.arguments, catalog)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "model": self.model,
            "arguments": dict(self.arguments),
            "trail": [
                {"name": step.name, "raw": step.raw, "notes": list(step.notes), "seconds": step.seconds}
                for step in self.trail
            ],
        }


def plan_call(model: str, arguments: Mapping[str, Any], catalog: Catalog) -> APICall:
    """A call of a model with these arguments; those that are missing or impossible are the model's default ones."""
    parameters = {
        "width": arguments.get("width"),
        "height": arguments.get("height"),
        "sampling method": arguments.get("sampler"),
        "sampling steps": arguments.get("steps"),
        "cfg scale": arguments.get("cfg_scale"),
    }
    return catalog.reconstruct(model, {name: value for name, value in parameters.items() if value is not None})


def call_arguments(call: APICall, clip_skip: int | None = None) -> dict[str, Any]:
    """The arguments of a call, as plans and ChatGenBench have them."""
    return {
        "sampler": call.sampling_method,
        "steps": call.sampling_steps,
        "cfg_scale": call.cfg_scale,
        "width": call.width,
        "height": call.height,
        "clip_skip": clip_skip,
    }
