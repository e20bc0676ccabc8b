"""The baseline without fine-tuning: a policy as it is rewrites the chat after a few examples, and one default model
draws it with default parameters (ChatGen Sec. 4.1, "Baseline Without Fine-Tuning")."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.agents.chat_answers import OpenChat
from align.agents.chatgen import ChatGenAgent, Truth, load_chat_policy
from align.agents.plans import Plan, Step, call_arguments
from align.bench.chatgen.schema import chat_text
from align.chat_dialogue import ChatDialogue
from align.chats import load_chats
from rollouts.catalog import Catalog

_TASK = "Rewrite what somebody asks for into a prompt for a text-to-image model. Answer with the prompt only."
_NO_PROMPT = "no_prompt: the user's words instead"


class RewritingAgent(ChatGenAgent):
    """Prompts by in-context learning, everything else by default.

    Args:
        policy: Any chat model, in evaluation mode.
        dialogue: Its format.
        catalog: With the default model.
        rows: ChatGenBench rows of the training split; some are shown as examples.
        base_model: Architecture whose default call is made.
        num_examples: Shown.
        max_tokens: Of examples and chat.
        max_prompt_tokens: Longest prompt that is written.
        seed: Of the choice of examples.
    """

    def __init__(
        self,
        policy: Any,
        dialogue: ChatDialogue,
        catalog: Catalog,
        rows: Sequence[Mapping[str, Any]],
        *,
        base_model: str = "SD 1.5",
        num_examples: int = 3,
        max_tokens: int = 1024,
        max_prompt_tokens: int = 200,
        seed: int = 0,
    ) -> None:
        self.policy, self.dialogue, self.catalog = policy, dialogue, catalog
        self.max_tokens, self.max_prompt_tokens = max_tokens, max_prompt_tokens
        self._default = catalog.default_call(base_model)
        chosen = random.Random(seed).sample(range(len(rows)), min(num_examples, len(rows)))
        lines = [_TASK]
        for index in chosen:
            row = rows[index]
            said = " ".join(chat_text(row["messages"]).split())
            lines.append(f"Request: {said}\nPrompt: {row['prompt']}")
        self._task = "\n\n".join([*lines, "Request:"])

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
    ) -> "RewritingAgent":
        """Load any chat model; the catalogue, examples and pictures of chats are the data set's."""
        models = Catalog.load(Path(catalog) if catalog else Path(dataset) / "catalog.jsonl")
        rows = load_chats(dataset)["train"]
        return cls(*load_chat_policy(policy, dataset, dtype, device), models, rows, **options)

    def _plan_together(
        self, chats: Sequence[OpenChat], truths: Sequence[Truth], without: Sequence[str | None]
    ) -> list[Plan]:
        """Examples are of the training split, so nothing has to be left out."""
        answers = self._ask(chats, self._task, self.max_prompt_tokens)
        return [
            self._plan(answer.text, chat.said, truth, answer.seconds, answer.notes)
            for answer, chat, truth in zip(answers, chats, truths, strict=True)
        ]

    def replanned(self, plan: Mapping[str, Any], truth: Truth) -> Plan:
        """See `ChatGenAgent.replanned`."""
        step = plan["trail"][0]
        notes = [note for note in step["notes"] if note != _NO_PROMPT]
        return self._plan(step["raw"], plan["prompt"], truth, step["seconds"], notes)

    def _plan(self, text: str, said: str, truth: Truth, seconds: float, of_chat: Sequence[str] = ()) -> Plan:
        written = " ".join(text.removeprefix("Prompt:").split())
        prompt = truth.get("prompt") or written or said or "a picture"
        replaced = () if written or "prompt" in truth else (_NO_PROMPT,)
        notes = (*of_chat, *replaced)
        model = truth.get("model", self._default.model)
        arguments = dict(truth.get("arguments") or call_arguments(self._default))
        trail = (
            Step("prompt", text, notes, seconds),
            Step("model", [model]),
            Step("arguments", arguments),
        )
        return Plan(prompt, "", model, arguments, trail)
