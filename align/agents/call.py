"""Ask a trained agent which model to call, and how.

    python -m align.agents.call "a cute corgi, pixel art" --model_name_or_path runs/rrhf --dataset data/dabench
    python -m align.agents.call "a cute corgi" "a house" --top_k 3 --filter '{"type": "LoRA", "max_seconds": 5}' …
    python -m align.agents.call "a cute corgi" --render corgi.png --weights models/ …
    python -m align.agents.call "a cute corgi" --format comfyui …

Prints one line of JSON per prompt; without a prompt on the command line, prompts are read from standard input, a line
each. `--format` writes the call as a payload for A1111, as its infotext, as a ComfyUI workflow, or as a Python script.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.agents.config import AGENT_ERRORS, AgentConfig
from align.agents.diffagent import Answer, DiffAgent
from align.agents.exports import EXPORTS, ExportError
from align.agents.filters import CallFilter, FilterError
from rewards.commandline import ConfigError, run_command
from rollouts.requests import RenderError

logger = logging.getLogger(__name__)

FORMATS = ("answer", "call", *EXPORTS)


@dataclass
class CallConfig(AgentConfig):
    """Options of `python -m align.agents.call`, beside the prompts."""

    negative_prompt: str = field(default="", metadata={"help": "What the pictures should not show."})
    top_k: int = field(default=0, metadata={"help": "Alternatives to list."})
    filter: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "What may be called, as JSON: base_model, type, license, allow, deny, nsfw, "
                                "samplers, max_steps, max_seconds."}
    )  # fmt: skip
    format: str = field(default="answer", metadata={"help": f"What to print: {', '.join(FORMATS)}."})
    render: str | None = field(
        default=None, metadata={"help": "Draw the call into this .png; several prompts are numbered. Needs `weights`."}
    )
    weights: str | None = field(default=None, metadata={"help": "Folder of the text-to-image models' weights."})
    seed: int = field(default=0, metadata={"help": "Of the picture."})
    native_side: int | None = field(
        default=None, metadata={"help": "Pixels drawn for an architecture's own side, for toy models: 64."}
    )
    batch_size: int = field(default=16, metadata={"help": "Prompts per forward pass."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.filter, str):
            try:
                self.filter = json.loads(self.filter)
            except ValueError as error:
                raise ValueError(f"`filter` must be a JSON object, but is {self.filter!r}: {error}.") from error
        if self.format not in FORMATS:
            raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, but is {self.format!r}.")
        if self.render is not None and self.weights is None:
            raise ValueError("`render` needs `weights`, the folder of the text-to-image models.")
        if self.render is not None and not self.render.endswith(".png"):
            raise ValueError(f"`render` must be a .png file, but is {self.render!r}.")
        for name, least in (("top_k", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, but is {getattr(self, name)}.")


def main(config: CallConfig, prompts: Sequence[str] = ()) -> None:
    """Answer the prompts, one line each as they come."""
    filter = CallFilter.from_dict({} if config.filter is None else config.filter)
    agent = config.load_agent()
    asked = list(prompts) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not asked:
        raise ConfigError('No prompt: python -m align.agents.call "a cute corgi, pixel art" --model_name_or_path …')
    for start in range(0, len(asked), config.batch_size):
        batch = [
            {"prompt": text, "negative prompt": config.negative_prompt} for text in asked[start:][: config.batch_size]
        ]
        for number, (item, answer) in enumerate(
            zip(batch, agent.answer(batch, filter, top_k=config.top_k), strict=True)
        ):
            print(_printed(answer, agent, item, config), flush=True)
            if config.render is not None:
                _draw(answer, agent, item, config, start + number if len(asked) > 1 else None)


def _printed(answer: Answer, agent: DiffAgent, item: dict[str, str], config: CallConfig) -> str:
    given = (answer.call, agent.catalog, item["prompt"], item["negative prompt"], config.seed)
    if config.format == "call":
        return answer.call.to_json()
    if config.format in EXPORTS:
        found = EXPORTS[config.format](*given)
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return json.dumps({"prompt": item["prompt"]} | answer.to_dict(), ensure_ascii=False)


def _draw(answer: Answer, agent: DiffAgent, item: dict[str, str], config: CallConfig, number: int | None) -> None:
    from rollouts.rendering import DiffusersRenderer
    from rollouts.requests import RenderRequest, RenderSettings, resolve
    from rollouts.weights import WeightFolder

    path = Path(str(config.render))
    path = path if number is None else path.with_stem(f"{path.stem}-{number}")
    device = str(agent.policy.device)
    settings = RenderSettings(
        dtype="float16" if device.startswith("cuda") else "float32", device_type=device.split(":")[0],
        native_side=config.native_side,
    )  # fmt: skip
    request = RenderRequest(answer.call, item["prompt"], item["negative prompt"], config.seed)
    renderer = DiffusersRenderer(agent.catalog, WeightFolder(Path(str(config.weights))), settings)
    (result,) = renderer.render([resolve(request, agent.catalog, settings)])
    if result.image is None:
        failure = result.failure
        raise ConfigError(
            f"The call can't be drawn: {failure.reason if failure else ''}: {failure and failure.message}"
        )
    result.image.save(path)
    logger.info("%s", path)


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The prompts, which come first, and the options."""
    first = next((i for i, text in enumerate(args) if text.startswith("--") or text == "-h"), len(args))
    return list(args[:first]), list(args[first:])


if __name__ == "__main__":
    asked_for, sys.argv[1:] = _split(sys.argv[1:])

    def _run(config: CallConfig) -> None:
        main(config, asked_for)

    _run.__module__ = main.__module__
    run_command(_run, CallConfig, errors=(*AGENT_ERRORS, FilterError, ExportError, RenderError))
