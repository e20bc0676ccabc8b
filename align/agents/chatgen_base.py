"""ChatGen-Base: one policy writes the whole plan (ChatGen Eq. 1)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.agents.chat_answers import OpenChat
from align.agents.chatgen import ChatGenAgent, Truth, load_chat_policy
from align.agents.plans import Plan, Step, call_arguments, plan_call
from align.chat_dialogue import ChatDialogue
from rollouts.catalog import Catalog

_NOT_JSON = "not_json"
_NO_PROMPT = "no_prompt: the user's words instead"


class BaseAgent(ChatGenAgent):
    """ChatGen-Base: one policy writes everything at once; what is no valid plan is put right and noted.

    Args:
        policy: Trained with `learn: plan`, in evaluation mode.
        dialogue: Its format.
        catalog: Models that may be chosen.
        base_model: Architecture whose default model stands in for one that is not in the catalogue.
        max_tokens: Of a chat.
        max_plan_tokens: Longest plan that is written.
    """

    def __init__(
        self,
        policy: Any,
        dialogue: ChatDialogue,
        catalog: Catalog,
        *,
        base_model: str = "SD 1.5",
        max_tokens: int = 1024,
        max_plan_tokens: int = 400,
    ) -> None:
        self.policy, self.dialogue, self.catalog = policy, dialogue, catalog
        self.max_tokens, self.max_plan_tokens = max_tokens, max_plan_tokens
        self._default = catalog.default_call(base_model)

    @classmethod
    def from_pretrained(
        cls,
        policy: str | Path,
        *,
        dataset: str | Path,
        catalog: str | Path | None = None,
        dtype: str = "auto",
        device: str | None = None,
        **options: Any,
    ) -> "BaseAgent":
        """Load the policy; the catalogue and pictures of chats are the data set's."""
        models = Catalog.load(Path(catalog) if catalog else Path(dataset) / "catalog.jsonl")
        return cls(*load_chat_policy(policy, dataset, dtype, device), models, **options)

    def _plan_together(
        self, chats: Sequence[OpenChat], truths: Sequence[Truth], without: Sequence[str | None]
    ) -> list[Plan]:
        """Truths replace what was written, as everything is written at once."""
        answers = self._ask(chats, self.dialogue.chat_form.planning_task, self.max_plan_tokens)
        return [
            self._read(answer.text, chat.said, truth, answer.seconds, answer.notes)
            for answer, chat, truth in zip(answers, chats, truths, strict=True)
        ]

    def replanned(self, plan: Mapping[str, Any], truth: Truth) -> Plan:
        """See `ChatGenAgent.replanned`."""
        trail = {step["name"]: step for step in plan["trail"]}
        prompt = trail["prompt"]
        written = {"prompt": prompt["raw"], "negative_prompt": plan["negative_prompt"]}
        written |= {"model": trail["model"]["raw"][0], "arguments": trail["arguments"]["raw"]}
        notes = [note for note in prompt["notes"] if note != _NO_PROMPT]
        return self._complete(written | dict(truth), plan["prompt"], prompt["seconds"], notes)

    def _read(self, text: str, said: str, truth: Truth, seconds: float, of_chat: Sequence[str] = ()) -> Plan:
        """A valid plan of what the policy wrote, with the truth in its place."""
        try:
            written = json.loads(text)
        except (ValueError, RecursionError):
            written = None
        if isinstance(written, dict):
            return self._complete(written | dict(truth), said, seconds, of_chat)
        return self._complete(truth, said, seconds, [*of_chat, _NOT_JSON])

    def _complete(self, given: Mapping[str, Any], said: str, seconds: float, notes: Sequence[str]) -> Plan:
        """A valid plan, each part by itself."""
        prompt = given.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            prompt = said or "a picture"
            notes = [*notes, _NO_PROMPT]
        negative = given.get("negative_prompt")
        model, model_notes = given.get("model"), []
        if not isinstance(model, str) or model not in self.catalog:
            model_notes = ["unknown_model: the default one instead"]
        name = self._default.model if model_notes else str(model)
        wanted = given.get("arguments")
        wanted = wanted if isinstance(wanted, dict) else {}
        arguments = call_arguments(plan_call(name, wanted, self.catalog), _clip_skip(wanted.get("clip_skip")))
        replaced = [
            key for key in ("sampler", "steps", "cfg_scale", "width", "height") if wanted.get(key) != arguments[key]
        ]
        argument_notes = [f"{key}: the model's default instead" for key in replaced]
        trail = (
            Step("prompt", given.get("prompt"), tuple(notes), seconds),
            Step("model", [model], tuple(model_notes)),
            Step("arguments", wanted, tuple(argument_notes)),
        )
        return Plan(prompt, negative if isinstance(negative, str) else "", name, arguments, trail)


def _clip_skip(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 12 else None
