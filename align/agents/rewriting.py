"""Baselines without fine-tuning, whose prompts one default model draws with default parameters: a policy as it is
rewrites the chat after a few examples (ChatGen Sec. 4.1, "Baseline Without Fine-Tuning"), or the user's words are the
prompt."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.agents.chat_answers import OpenChat
from align.agents.chatgen import ChatGenAgent, Truth, load_chat_policy
from align.agents.plans import Plan, Step, call_arguments
from align.bench.chatgen.schema import chat_text
from align.chat_dialogue import PICTURE, ChatDialogue, Messages, read_turns
from align.chats import load_chats
from rollouts.api import APICall
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
        return _drawn_by_default(prompt, Step("prompt", text, notes, seconds), truth, self._default)


class VerbatimAgent(ChatGenAgent):
    """What people get without any agent: their words as the prompt, everything else by default.

    Args:
        catalog: With the default model.
        base_model: Architecture whose default call is made.
    """

    def __init__(self, catalog: Catalog, *, base_model: str = "SD 1.5") -> None:
        self.catalog = catalog
        self._default = catalog.default_call(base_model)

    def plans(
        self,
        chats: Sequence[Messages],
        truths: Sequence[Truth] | None = None,
        without: Sequence[str | None] | None = None,
    ) -> list[Plan]:
        """See `ChatGenAgent.plans`. Pictures are not opened: words are all it has."""
        return [
            self._plan(_users_words(messages), truth)
            for messages, truth in zip(chats, truths or [{}] * len(chats), strict=True)
        ]

    def replanned(self, plan: Mapping[str, Any], truth: Truth) -> Plan:
        """See `ChatGenAgent.replanned`."""
        return self._plan(plan["trail"][0]["raw"], truth)

    def _plan(self, said: str, truth: Truth) -> Plan:
        prompt = truth.get("prompt") or said or "a picture"
        return _drawn_by_default(prompt, Step("prompt", said), truth, self._default)

    def _plan_together(
        self, chats: Sequence[OpenChat], truths: Sequence[Truth], without: Sequence[str | None]
    ) -> list[Plan]:
        raise AssertionError("unreachable: `plans` opens no chat")


def _users_words(messages: Messages) -> str:
    """Of all turns, in one line."""
    said = [turn.text.replace(PICTURE, " ") for turn in read_turns(messages) if turn.role == "user"]
    return " ".join(" ".join(said).split())


def _drawn_by_default(prompt: str, written: Step, truth: Truth, default: APICall) -> Plan:
    """The default call, but for what is known."""
    model = truth.get("model", default.model)
    arguments = dict(truth.get("arguments") or call_arguments(default))
    return Plan(prompt, "", model, arguments, (written, Step("model", [model]), Step("arguments", arguments)))
