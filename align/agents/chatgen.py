"""ChatGen at inference: from a freestyle chat to prompt, model and arguments (ChatGen Sec. 3.2).

    agent = EvoAgent.from_pretrained("runs/chatgen-evo", "runs/chatgen-tokens", dataset="data/chatgenbench")
    plan = agent.plan([{"role": "user", "content": "could you draw my corgi as pixel art?"}])
    plan.prompt, plan.model, plan.arguments, plan.notes

Whatever the chat says and whatever a policy writes, a plan names a model of the catalogue and arguments that it takes.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from align.agents.chat_answers import ChatAnswer, OpenChat, answer_chats, more_inputs, open_chats
from align.agents.plans import Plan, Step, call_arguments, plan_call
from align.agents.shown_examples import Order, Shown, ShownExamples, usual_arguments
from align.chat_dialogue import ChatDialogue, Messages
from align.chats import load_chats, pictures_folder
from align.picture_dialogue import load_dialogue
from align.trainers.model_token_backbone import Backbone
from align.trainers.model_token_config import ModelTokenError
from align.trainers.model_token_rows import ModelTokens
from rollouts.call_constraint import CallConstraint
from rollouts.call_grammar import CallLimits
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.constrained_generation import generate_calls
from rollouts.policy import load_policy
from rollouts.token_bytes import TokenBytes

Truth = Mapping[str, Any]
"""Ground truth that stands in for steps, for ablations: `prompt`, `model`, `arguments`."""

Arguments = Literal["written", "usual"]
"""Where Evo's arguments come from."""

_ARGUMENTS_TASK = "How pictures were made with this model. Settings are JSON."
_DESCRIPTION = ', "model description": '
_TOP = 5


class ChatGenAgent(ABC):
    """Plans for chats.

    Attributes:
        policy, dialogue: Who writes, and in which format.
        catalog: The models.
        max_tokens: Of a chat; older messages are left out.
        batch_size: Chats that are planned together.
        no_repeat_ngram_size: No sequence of so many tokens is written that stood in the chat or the answer before; 0:
            any. For policies that repeat themselves without end.
    """

    policy: Any
    dialogue: ChatDialogue
    catalog: Catalog
    max_tokens: int
    batch_size: int = 8
    no_repeat_ngram_size: int = 0

    def plan(self, messages: Messages, truth: Truth | None = None) -> Plan:
        """The plan for one chat; see `plans`."""
        return self.plans([messages], [truth or {}])[0]

    def plans(
        self,
        chats: Sequence[Messages],
        truths: Sequence[Truth] | None = None,
        without: Sequence[str | None] | None = None,
    ) -> list[Plan]:
        """A valid plan for each chat.

        A picture of a chat is a path in the data set's folder, or of the caller's own program: a PIL image or a
        `pathlib.Path`. One that can't be opened is noted, and the plan is made without it.

        Args:
            chats: Messages of ChatGenBench; each ends with the user's.
            truths: What is known already of each chat; those steps are not asked of the policy.
            without: The demonstration of each chat that must not be shown as an example.

        Raises:
            DialogueError: A chat that is none, or that doesn't fit.
        """
        truths = [{}] * len(chats) if truths is None else truths
        without = [None] * len(chats) if without is None else without
        found: list[Plan] = []
        for start in range(0, len(chats), self.batch_size):  # pictures of so many chats are open at a time
            some = slice(start, start + self.batch_size)
            found += self._plan_together(open_chats(self.dialogue, chats[some]), truths[some], without[some])
        return found

    def replanned(self, plan: Mapping[str, Any], truth: Truth) -> Plan | None:
        """The plan that `plan` would be with ground truth for some steps; None if the policy has to be asked.

        Args:
            plan: `Plan.to_dict()` of the chat, made without any.
            truth: See `plans`.
        """
        return None

    @abstractmethod
    def _plan_together(
        self, chats: Sequence[OpenChat], truths: Sequence[Truth], without: Sequence[str | None]
    ) -> list[Plan]:
        """Plans for a batch of chats; see `plans`."""

    def _ask(self, chats: Sequence[OpenChat], task: str, max_new_tokens: int) -> list[ChatAnswer]:
        """What the policy writes."""
        return answer_chats(
            self.policy, self.dialogue, chats, task, max_tokens=self.max_tokens, max_new_tokens=max_new_tokens,
            batch_size=self.batch_size, no_repeat_ngram_size=self.no_repeat_ngram_size,
        )  # fmt: skip


def load_chat_policy(
    policy: str | Path, dataset: str | Path | None, dtype: str = "auto", device: str | None = None
) -> tuple[Any, ChatDialogue]:
    """A policy in evaluation mode and its format, with its processor if it sees pictures.

    Args:
        policy: A directory or a Hub id.
        dataset: Folder that paths of pictures in chats are relative to; `None`: there are none.
        dtype: See `load_policy`.
        device: Where to; `None`: a GPU if there is one.
    """
    loaded = load_policy(str(policy), dtype=dtype)
    loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return loaded.eval(), load_dialogue(policy, folder=dataset and pictures_folder(dataset))


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
        arguments: `written`: by the policy after the examples (Eq. 5), with samplers that demonstrations were drawn
            with. `usual`: the most frequent values of the examples, the best one's where several are, for policies
            that are too small to learn in context.

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
        arguments: Arguments = "written",
    ) -> None:
        if arguments not in get_args(Arguments):
            raise ValueError(f"`arguments` must be one of {', '.join(get_args(Arguments))}, but is {arguments!r}.")
        self.policy, self.dialogue, self.catalog, self.examples = policy, dialogue, catalog, examples
        self.arguments: Arguments = arguments
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
        models = Catalog.load(Path(catalog) if catalog else Path(dataset) / "catalog.jsonl")
        examples = ShownExamples(load_chats(dataset)["train"], order)
        written = load_chat_policy(policy, dataset, dtype, device)
        return cls(*written, ModelTokens.load(tokens), models, examples, **options)

    def _plan_together(
        self, chats: Sequence[OpenChat], truths: Sequence[Truth], without: Sequence[str | None]
    ) -> list[Plan]:
        prompts = self._write(chats, truths)
        models = self._choose(chats, [step.raw for step in prompts], truths)
        names = [step.raw[0] for step in models]
        arguments, negatives = self._configure([step.raw for step in prompts], names, truths, without)
        return [
            Plan(p.raw, negative, m.raw[0], a.raw, (p, m, a))
            for p, m, a, negative in zip(prompts, models, arguments, negatives, strict=True)
        ]

    def _write(self, chats: Sequence[OpenChat], truths: Sequence[Truth]) -> list[Step]:
        """Stage 1 (Eq. 2)."""
        steps = {
            i: Step("prompt", truth["prompt"], chats[i].notes) for i, truth in enumerate(truths) if "prompt" in truth
        }
        asked = [i for i in range(len(chats)) if i not in steps]
        answers = self._ask([chats[i] for i in asked], self.dialogue.chat_form.writing_task, self.max_prompt_tokens)
        for i, answer in zip(asked, answers, strict=True):
            text, notes = answer.text, answer.notes
            if not text:
                text = self._beginning(chats[i].said) or "a picture"
                notes += ("no_prompt: the user's words instead",)
            notes += () if answer.finished else ("prompt_cut",)
            steps[i] = Step("prompt", text, notes, answer.seconds)
        return [steps[i] for i in range(len(chats))]

    def _beginning(self, text: str) -> str:
        """As much of a text as a prompt may have."""
        tokenizer = self.dialogue.tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: self.max_prompt_tokens]
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _choose(self, chats: Sequence[OpenChat], prompts: Sequence[str], truths: Sequence[Truth]) -> list[Step]:
        """Stage 2 (Eq. 4), among the models of the catalogue."""
        started = time.perf_counter()
        encoded = [
            self.dialogue.encode_selection(chat.messages, prompt, self.max_tokens)
            for chat, prompt in zip(chats, prompts, strict=True)
        ]
        hidden = self._backbone([chat.input_ids for chat in encoded], more_inputs(self.dialogue, encoded)).hidden
        found = self.tokens.choose(hidden, min(_TOP, len(self.tokens)))
        seconds = (time.perf_counter() - started) / len(chats)
        steps = []
        for truth, choices in zip(truths, found, strict=True):
            names = [choice.name for choice in choices]
            if "model" in truth:
                names = [truth["model"], *(name for name in names if name != truth["model"])]
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
        if self.arguments == "usual":
            calls = [plan_call(models[i], usual_arguments(shown[i]), self.catalog) for i in asked]
        else:
            requests = [self._request(self.catalog[models[i]], prompts[i], shown[i]) for i in asked]
            constraints = [self._constraint(self.catalog[models[i]]) for i in asked]
            calls = [written.call for written in generate_calls(self.policy, requests, constraints)]
        seconds = (time.perf_counter() - started) / max(1, len(asked))
        steps: dict[int, Step] = {}
        for i, truth in enumerate(truths):
            if "arguments" in truth:
                steps[i] = Step("arguments", dict(truth["arguments"]))
        for i, call in zip(asked, calls, strict=True):
            clip_skip = usual_arguments(shown[i])["clip_skip"]
            notes = () if shown[i] else ("no_examples",)
            steps[i] = Step("arguments", call_arguments(call, clip_skip), notes, seconds)
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
            samplers = self.examples.samplers | {entry.default_call().sampling_method}
            limits = CallLimits(samplers=samplers)
            constraint = CallConstraint.of_models(self.dialogue, [entry], limits=limits, tokens=self._bytes)
            self._constraints[entry.name] = constraint
        return self._constraints[entry.name]
