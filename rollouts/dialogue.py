"""How instructions and calls are written as a dialogue: the one place that SFT, candidates and agents share.

A pair becomes a single-round user-agent dialogue (DiffAgent Sec. 4.1) through the tokenizer's own chat template; base
models without one get a plain "User: ... / Agent: ..." form. Training and generation see the same prompt tokens, since
a pair is always encoded as the tokens of the prompt followed by the tokens of the rest.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from rewards.files import write_atomically

logger = logging.getLogger(__name__)

FILE_NAME = "dialogue.json"
Form = TypeVar("Form")


class DialogueError(ValueError):
    """A dialogue that can't be written: the template refuses it, or it does not fit."""


@dataclass(frozen=True)
class DialogueFormat:
    """What a policy was trained to read; saved beside its weights, because any other form is another language to it.

    Attributes:
        system_prompt: The system message; `None` leaves it to the template.
        negative_prompt: Whether the user's message also says the negative prompt.
        plain: Use the plain form although the tokenizer has a chat template.
    """

    system_prompt: str | None = None
    negative_prompt: bool = False
    plain: bool = False

    def __post_init__(self) -> None:
        if self.system_prompt is not None and not isinstance(self.system_prompt, str):
            raise DialogueError(f"`system_prompt` must be text or none, but is {self.system_prompt!r}.")
        for name in ("negative_prompt", "plain"):
            if not isinstance(getattr(self, name), bool):
                raise DialogueError(f"`{name}` must be true or false, but is {getattr(self, name)!r}.")

    def save(self, folder: str | Path) -> None:
        """Write `dialogue.json` into a model folder."""
        write_form(Path(folder) / FILE_NAME, asdict(self))

    @classmethod
    def load(cls, folder: str | Path) -> "DialogueFormat":
        """Read `dialogue.json` of a model folder; the defaults if the model was not trained by this toolkit."""
        return read_form(cls, Path(folder) / FILE_NAME, "a dialogue format")


def write_form(path: Path, values: Mapping[str, Any]) -> None:
    """Keep a format in a file."""
    write_atomically(path, json.dumps(values, indent=1).encode())


def read_form(cls: type[Form], path: Path, what: str) -> Form:
    """A format that `write_form` kept; the defaults if there is no file.

    Raises:
        DialogueError: The file is something else; the message calls it `what`.
    """
    if not path.is_file():
        logger.info("%s has no %s: using the default dialogue format", path.parent, path.name)
        return cls()
    try:
        return cls(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DialogueError(f"{path} is not {what}: {error}") from error


class Encoded(NamedTuple):
    """A dialogue as tokens: `labels` are the ids of the response (with its end token) and -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]
    shortened: bool  # whether the user's text was cut to fit


class Dialogue:
    """Writes dialogues for one tokenizer.

    Text of users and of model cards is never trusted: control tokens spelled out in it are broken up by a space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, form: DialogueFormat | None = None) -> None:
        self.tokenizer = tokenizer
        self.form = form or DialogueFormat()
        if tokenizer.eos_token is None:
            raise DialogueError("The tokenizer has no EOS token, so a policy could never end its response.")
        self.uses_template = bool(tokenizer.chat_template) and not self.form.plain
        self._template: str | None = None  # the tokenizer's own
        if not self.uses_template and not self.form.plain:
            logger.info("The tokenizer has no chat template: using the plain User/Agent form.")
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        # Longest first: breaking up a shorter one inside would leave the rest of the longer one as it was.
        self._control_tokens = sorted(
            (token for token in added | set(tokenizer.all_special_tokens) if len(token) > 1), key=len, reverse=True
        )

    def save_form(self, folder: str | Path) -> None:
        """Keep the format with a policy's weights."""
        self.form.save(folder)

    def user_text(self, instruction: Mapping[str, str] | str) -> str:
        """The user's message of an instruction: its prompt, and its negative prompt if the format says so."""
        if isinstance(instruction, str):
            return instruction
        negative = instruction.get("negative prompt", "")
        if self.form.negative_prompt and negative:
            return f"{instruction['prompt']}\nNegative prompt: {negative}"
        return instruction["prompt"]

    def prompt_text(self, instruction: Mapping[str, str] | str) -> str:
        """Everything up to where the agent's response begins."""
        return self._render(self.user_text(instruction), None)

    def encode_prompt(self, instruction: Mapping[str, str] | str, max_tokens: int | None = None) -> list[int]:
        """Token ids of `prompt_text`; the user's text is cut if they would be more than `max_tokens`.

        Raises:
            DialogueError: If the template refuses the dialogue, or is longer than `max_tokens` by itself.
        """
        return self._fit(self.user_text(instruction), None, max_tokens)[0]

    def encode(self, instruction: Mapping[str, str] | str, response: str, max_tokens: int | None = None) -> Encoded:
        """Token ids and completion-only labels of a pair.

        Args:
            instruction: Prompt, or DABench's instruction object.
            response: The agent's text, always kept whole.
            max_tokens: The user's text is cut at its end if the dialogue would be longer than this.

        Raises:
            DialogueError: If the response alone does not fit, or the template does not suit (see the message).
        """
        prompt_ids, response_ids, shortened = self._fit(self.user_text(instruction), response, max_tokens)
        labels = [-100] * len(prompt_ids) + response_ids
        return Encoded(prompt_ids + response_ids, labels, shortened)

    def response_ids(self, beginnings: Sequence[str]) -> list[list[int]]:
        """Token ids of responses that begin like this, without an end token: what a policy has written so far.

        The last token may be another one once the text goes on, as tokens reach across what is written later.

        Raises:
            DialogueError: As `encode` does.
        """
        self._encode_parts("", "{")  # refuses a template that does not suit
        rest = self._render("", "{")[len(self._render("", None)) :]
        lead = rest[: rest.index("{")]  # white space that the template or the plain form puts first
        return [self._ids(lead + self._defuse(text)) for text in beginnings]

    def decode(self, response_ids: Any) -> str:
        """The response's text, without control tokens and surrounding white space."""
        return str(self.tokenizer.decode(response_ids, skip_special_tokens=True)).strip()

    def _fit(self, user: str, response: str | None, max_tokens: int | None) -> tuple[list[int], list[int], bool]:
        prompt_ids, response_ids = self._encode_parts(user, response)
        if max_tokens is None or len(prompt_ids) + len(response_ids) <= max_tokens:
            return prompt_ids, response_ids, False
        user_ids = self._ids(self._defuse(user))
        while user_ids:
            surplus = len(prompt_ids) + len(response_ids) - max_tokens
            if surplus <= 0:
                return prompt_ids, response_ids, True
            user_ids = user_ids[:-surplus] if surplus < len(user_ids) else []
            user = str(self.tokenizer.decode(user_ids, clean_up_tokenization_spaces=False)).rstrip("\ufffd")
            prompt_ids, response_ids = self._encode_parts(user, response)
        if len(prompt_ids) + len(response_ids) > max_tokens:
            raise DialogueError(
                f"A dialogue needs {len(prompt_ids) + len(response_ids)} tokens without any of the user's text, but "
                f"only {max_tokens} are allowed. Raise the limit or shorten the model descriptions."
            )
        return prompt_ids, response_ids, True

    def _encode_parts(self, user: str, response: str | None) -> tuple[list[int], list[int]]:
        prompt = self._render(user, None)
        if response is None:
            return self._ids(prompt), []
        return self._ids(prompt), self._response_ids(prompt, self._render(user, response), response)

    def _response_ids(self, prompt: str, whole: str, response: str) -> list[int]:
        """Tokens of a response with its end token, of the dialogue's text without and with it."""
        if not whole.startswith(prompt):
            raise DialogueError(
                "The chat template writes a prompt differently once a response follows it, so the response can't be "
                "told from the prompt. Set `plain: true`, or give the tokenizer a template without such a condition."
            )
        rest = whole[len(prompt) :]
        if not rest.lstrip().startswith(self._defuse(response).strip()):
            raise DialogueError(
                f"The chat template writes {rest[:40]!r} where the response {response[:40]!r} should begin, and the "
                "policy would learn to write that as well. Set `plain: true`, or give the tokenizer another template."
            )
        ids = self._ids(rest.rstrip("\n"))
        end = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [end] else [*ids, end]

    def _render(self, user: str, response: str | None) -> str:
        user = self._defuse(user)
        response = self._defuse(response) if response is not None else None
        if not self.uses_template:
            system = f"{self.form.system_prompt}\n" if self.form.system_prompt else ""
            bos = self.tokenizer.bos_token or ""
            return f"{bos}{system}User: {user}\nAgent:" + (f" {response}" if response is not None else "")
        messages = [{"role": "user", "content": user}]
        if self.form.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.form.system_prompt})
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        return self._apply_template(messages, response is None)

    def _apply_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    enable_thinking=False,  # Qwen3 and its like: the empty thought belongs to the prompt
                )
            )
        except TemplateError as error:
            raise DialogueError(f"The tokenizer's chat template refuses the dialogue: {error}") from error

    def _defuse(self, text: str) -> str:
        """Break up control tokens that somebody typed: `<|im_end|>` becomes `< |im_end|>`."""
        for token in self._control_tokens:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
