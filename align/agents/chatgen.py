"""ChatGen at inference: from a freestyle chat to prompt, model and arguments (ChatGen Sec. 3.2).

    agent = EvoAgent.from_pretrained("runs/chatgen-evo", "runs/chatgen-tokens", dataset="data/chatgenbench")
    plan = agent.plan([{"role": "user", "content": "could you draw my corgi as pixel art?"}])
    plan.prompt, plan.model, plan.arguments, plan.notes

Whatever the chat says and whatever a policy writes, a plan names a model of the catalogue and arguments that it takes.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from align.agents.plans import Plan, Step, call_arguments, plan_call
from align.agents.shown_examples import Order, Shown, ShownExamples, usual
from align.chat_dialogue import ChatDialogue, ChatFormat, Messages, read_turns
from align.chats import load_chats
from align.trainers.model_token_backbone import Backbone
from align.trainers.model_token_config import ModelTokenError
from align.trainers.model_token_rows import ModelTokens
from rollouts.call_constraint import CallConstraint
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.constrained_generation import generate_calls
from rollouts.policy import load_policy, load_tokenizer
from rollouts.responses import answer_prompts
from rollouts.token_bytes import TokenBytes

Truth = Mapping[str, Any]
"""Ground truth that stands in for steps, for ablations: `prompt`, `model`, `arguments`."""

_ARGUMENTS_TASK = "How pictures were made with this model. Settings are JSON."
_DESCRIPTION = ', "model description": '
_TOP = 5


class ChatGenAgent(ABC):
    """Plans for chats.

    Attributes:
        catalog: The models.
        batch_size: Chats that are planned together.
    """

    catalog: Catalog
    batch_size: int = 8

    def plan(self, messages: Messages, truth: Truth | None = None) -> Plan:
        """The plan for one chat; see `plans`."""
        return self.plans([messages], [truth or {}])[0]

    @abstractmethod
    def plans(
        self,
        chats: Sequence[Messages],
        truths: Sequence[Truth] | None = None,
        without: Sequence[str | None] | None = None,
    ) -> list[Plan]:
        """A valid plan for each chat.

        Args:
            chats: Messages of ChatGenBench; each ends with the user's.
            truths: What is known already of each chat; those steps are not asked of the policy.
            without: The demonstration of each chat that must not be shown as an example.

        Raises:
            DialogueError: A chat that is none, or that doesn't fit.
        """


class EvoAgent(ChatGenAgent):
    """ChatGen-Evo: prompt by the policy, model by its model token, arguments by in-context learning.

    Args:
        policy: Of stage 1, in evaluation mode.
        dialogue: Its format.
        tokens: Of stage 2.
        catalog: Models that may be chosen: those of `tokens` that are in it.
        examples: D(m).
        num_examples: Shown at most.
        max_tokens: Of a chat or of the examples; older messages and worse examples are left out.
        max_prompt_tokens: Longest prompt that is written.

    Raises:
        ModelTokenError: No model of the catalogue has a token, or the tokens are of another policy.
    """

    def __init__(
        self,
        policy: Any,
        dialogue: ChatDialogue,
        tokens: ModelTokens,
        catalog: Catalog,
        examples: ShownExamples,
        *,
        num_examples: int = 5,
        max_tokens: int = 1024,
        max_prompt_tokens: int = 200,
    ) -> None:
        self.policy, self.dialogue, self.catalog, self.examples = policy, dialogue, catalog, examples
        self.num_examples, self.max_tokens, self.max_prompt_tokens = num_examples, max_tokens, max_prompt_tokens
        self._backbone = Backbone(policy)
        if tokens.backbone and tokens.backbone != self._backbone.digest():
            raise ModelTokenError("The model tokens were trained on another policy; train them on this one.")
        absent = [name for name in tokens.names if name not in catalog]
        if len(absent) == len(tokens):
            raise ModelTokenError("No model of the catalogue has a token; is it another data set's catalogue?")
        self.tokens = tokens.remove_models(absent) if absent else tokens
        self._bytes = TokenBytes(dialogue.tokenizer)
        self._constraints: dict[str, CallConstraint] = {}

    @classmethod
    def from_pretrained(
        cls,
        policy: str | Path,
        tokens: str | Path,
        *,
        dataset: str | Path,
        catalog: str | Path | None = None,
        order: Order = "similar",
        dtype: str = "auto",
        device: str | None = None,
        **options: Any,
    ) -> "EvoAgent":
        """Load the policy of stage 1, the tokens of stage 2, and the training split that examples come from."""
        loaded = load_policy(str(policy), dtype=dtype)
        loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dialogue = ChatDialogue(load_tokenizer(str(policy)), ChatFormat.load(policy))
        models = Catalog.load(Path(catalog) if catalog else Path(dataset) / "catalog.jsonl")
        examples = ShownExamples(load_chats(dataset)["train"], order)
        return cls(loaded.eval(), dialogue, ModelTokens.load(tokens), models, examples, **options)

    def plans(
        self,
        chats: Sequence[Messages],
        truths: Sequence[Truth] | None = None,
        without: Sequence[str | None] | None = None,
    ) -> list[Plan]:
        """See `ChatGenAgent.plans`."""
        truths = [{}] * len(chats) if truths is None else truths
        without = [None] * len(chats) if without is None else without
        if not len(chats):
            return []
        prompts = self._write(chats, truths)
        models = self._choose(chats, [step.raw for step in prompts], truths)
        names = [step.raw[0] for step in models]
        arguments, negatives = self._configure([step.raw for step in prompts], names, truths, without)
        return [
            Plan(p.raw, negative, m.raw[0], a.raw, (p, m, a))
            for p, m, a, negative in zip(prompts, models, arguments, negatives, strict=True)
        ]

    def _write(self, chats: Sequence[Messages], truths: Sequence[Truth]) -> list[Step]:
        """Stage 1 (Eq. 2)."""
        task = self.dialogue.chat_form.writing_task
        steps: dict[int, Step] = {i: Step("prompt", t["prompt"]) for i, t in enumerate(truths) if "prompt" in t}
        asked = [i for i in range(len(chats)) if i not in steps]
        encoded = [self.dialogue.encode_chat(chats[i], task, None, self.max_tokens) for i in asked]
        answers = answer_prompts(
            self.policy, self.dialogue, [chat.input_ids for chat in encoded], max_new_tokens=self.max_prompt_tokens,
            batch_size=self.batch_size, progress=False,
        )  # fmt: skip
        for answer in answers:
            chat, index = encoded[answer.index], asked[answer.index]
            notes = [f"dropped_messages: {chat.dropped}"] if chat.dropped else []
            notes += ["shortened_message"] if chat.shortened else []
            text = answer.text
            if not text:
                text = self._beginning(read_turns(chats[index])[-1].text) or "a picture"
                notes.append("no_prompt: the user's words instead")
            notes += [] if answer.finished else ["prompt_cut"]
            steps[index] = Step("prompt", text, tuple(notes), answer.seconds)
        return [steps[i] for i in range(len(chats))]

    def _beginning(self, text: str) -> str:
        """As much of a text as a prompt may have."""
        tokenizer = self.dialogue.tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: self.max_prompt_tokens]
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _choose(self, chats: Sequence[Messages], prompts: Sequence[str], truths: Sequence[Truth]) -> list[Step]:
        """Stage 2 (Eq. 4), among the models of the catalogue."""
        steps = []
        for start in range(0, len(chats), self.batch_size):
            started = time.perf_counter()
            some = range(start, min(len(chats), start + self.batch_size))
            prefixes = [self.dialogue.encode_selection(chats[i], prompts[i], self.max_tokens).input_ids for i in some]
            found = self.tokens.choose(self._backbone(prefixes).hidden, min(_TOP, len(self.tokens)))
            seconds = (time.perf_counter() - started) / len(some)
            for i, choices in zip(some, found, strict=True):
                names = [choice.name for choice in choices]
                if "model" in truths[i]:
                    names = [truths[i]["model"], *(name for name in names if name != truths[i]["model"])]
                steps.append(Step("model", names, (), seconds))
        return steps

    def _configure(
        self,
        prompts: Sequence[str],
        models: Sequence[str],
        truths: Sequence[Truth],
        without: Sequence[str | None],
    ) -> tuple[list[Step], list[str]]:
        """Stage 3 (Eq. 5): examples of the model, and arguments that it takes written under a constraint."""
        started = time.perf_counter()
        shown = [
            self.examples.of(model, prompt, self.num_examples, without=own)
            for model, prompt, own in zip(models, prompts, without, strict=True)
        ]
        asked = [i for i, truth in enumerate(truths) if "arguments" not in truth]
        requests = [self._request(self.catalog[models[i]], prompts[i], shown[i]) for i in asked]
        constraints = [self._constraint(self.catalog[models[i]]) for i in asked]
        written = []
        for start in range(0, len(asked), self.batch_size):
            stop = start + self.batch_size
            written += generate_calls(self.policy, requests[start:stop], constraints[start:stop])
        seconds = (time.perf_counter() - started) / max(1, len(asked))
        steps: dict[int, Step] = {}
        for i, truth in enumerate(truths):
            if "arguments" in truth:
                steps[i] = Step("arguments", dict(truth["arguments"]))
        for i, call in zip(asked, written, strict=True):
            clip_skip = usual([item.arguments.get("clip_skip") for item in shown[i]])
            notes = () if shown[i] else ("no_examples",)
            steps[i] = Step("arguments", call_arguments(call.call, clip_skip), notes, seconds)
        negatives = [items[-1].negative_prompt if items else "" for items in shown]
        return [steps[i] for i in range(len(truths))], negatives

    def _request(self, entry: CatalogEntry, prompt: str, shown: Sequence[Shown]) -> list[int]:
        """The examples, as many as fit, and the prompt whose settings come next."""
        for first in range(len(shown) + 1):
            lines = [_ARGUMENTS_TASK]
            for item in shown[first:]:
                call = plan_call(entry.name, item.arguments, self.catalog)
                lines.append(f"Prompt: {item.prompt}\nSettings: {call.to_json().split(_DESCRIPTION)[0]}}}")
            lines.append(f"Prompt: {prompt}\nSettings:")
            messages = [{"role": "user", "content": "\n".join(lines)}]
            encoded = self.dialogue.encode_chat(messages, "", None, self.max_tokens)
            if not encoded.shortened or first == len(shown):
                return encoded.input_ids
        raise AssertionError("unreachable: without examples it is returned")

    def _constraint(self, entry: CatalogEntry) -> CallConstraint:
        if entry.name not in self._constraints:
            constraint = CallConstraint.of_models(self.dialogue, [entry], tokens=self._bytes)
            self._constraints[entry.name] = constraint
        return self._constraints[entry.name]


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

    def plans(
        self,
        chats: Sequence[Messages],
        truths: Sequence[Truth] | None = None,
        without: Sequence[str | None] | None = None,
    ) -> list[Plan]:
        """See `ChatGenAgent.plans`; truths replace what was written, as everything is written at once."""
        truths = [{}] * len(chats) if truths is None else truths
        task = self.dialogue.chat_form.planning_task
        encoded = [self.dialogue.encode_chat(chat, task, None, self.max_tokens) for chat in chats]
        answers = answer_prompts(
            self.policy, self.dialogue, [chat.input_ids for chat in encoded], max_new_tokens=self.max_plan_tokens,
            batch_size=self.batch_size, progress=False,
        )  # fmt: skip
        plans: dict[int, Plan] = {}
        for answer in answers:
            turns = read_turns(chats[answer.index])
            plans[answer.index] = self._read(answer.text, turns[-1].text, truths[answer.index], answer.seconds)
        return [plans[i] for i in range(len(chats))]

    def _read(self, text: str, said: str, truth: Truth, seconds: float) -> Plan:
        """A valid plan of what the policy wrote, each part by itself."""
        try:
            written = json.loads(text)
        except (ValueError, RecursionError):
            written = None
        notes = [] if isinstance(written, dict) else ["not_json"]
        given: dict[str, Any] = (written if isinstance(written, dict) else {}) | dict(truth)
        prompt = given.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            prompt = said or "a picture"
            notes.append("no_prompt: the user's words instead")
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
