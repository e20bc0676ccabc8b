"""A policy's answers to prompt sets, kept in files so that a run that was killed goes on where it was."""

import json
from pathlib import Path
from typing import Any, cast

from align.evaluation.metrics import bootstrap
from align.evaluation.prompt_sets import PromptSet
from rewards.commandline import ConfigError
from rewards.files import write_atomically


class PolicyAnswers:
    """What a policy answers; it is loaded only if something is left to ask.

    Args:
        name_or_path: The policy: a folder of align/sft.py or align/rrhf.py, or any causal LM.
        max_new_tokens: Token limit of an answer; longer ones are cut off.
        max_prompt_tokens: Longer prompts are cut.
        batch_size: Prompts per forward pass.
        dtype: float32, bfloat16, float16, or auto: as saved.
        device: cuda, cpu, ...; None: cuda if there is one.
        option: Name of the option that holds `name_or_path`, for messages.
    """

    def __init__(
        self,
        name_or_path: str,
        *,
        max_new_tokens: int,
        max_prompt_tokens: int | None,
        batch_size: int,
        dtype: str = "auto",
        device: str | None = None,
        option: str = "model_name_or_path",
    ) -> None:
        self.name_or_path, self.option = name_or_path, option
        self.batch_size, self.dtype, self.device = batch_size, dtype, device
        self.limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens}
        self._loaded: tuple[Any, Any] | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """What the answers depend on beside the prompt; every line of a file of answers holds it."""
        return {"policy": policy_identity(self.name_or_path), **self.limits}

    def answer(self, prompts: PromptSet, path: Path, *, sample_seed: int | None = None) -> list[dict[str, Any]]:
        """One answer per prompt: `text`, `seconds` (batched), `num_tokens`, `finished`, `index`, `prompt` and origin.

        Args:
            prompts: What is asked.
            path: File of the answers; what is in it already is not asked again.
            sample_seed: Sample at temperature 1, with this seed; None: greedy decoding.

        Raises:
            ConfigError: The policy can't be loaded, or the file holds answers to something else or of someone else.
        """
        from rollouts.responses import generate_responses

        sampling = {} if sample_seed is None else {"do_sample": True, "seed": sample_seed}
        origin = self.origin | ({} if sample_seed is None else {"sample_seed": sample_seed})
        done = read_answers(path, prompts, origin)
        if len(done) < len(prompts.instructions):
            policy, dialogue = self._load()
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                for response in generate_responses(
                    policy,
                    dialogue,
                    prompts.instructions,
                    batch_size=self.batch_size,
                    skip=frozenset(done),
                    **self.limits,
                    **sampling,
                ):
                    prompt = {"prompt": prompt_text(prompts.instructions[response.index])}
                    done[response.index] = response._asdict() | prompt | origin
                    file.write(json.dumps(done[response.index], ensure_ascii=False) + "\n")
                    file.flush()
        return [done[i] for i in range(len(prompts.instructions))]

    def latency(self, prompts: PromptSet, count: int) -> float | None:
        """Mean seconds per answer of the first `count` prompts, asked one at a time; None without prompts.

        Raises:
            ConfigError: The policy can't be loaded.
        """
        from rollouts.responses import generate_responses

        chosen = prompts.instructions[:count]
        if not chosen:
            return None
        policy, dialogue = self._load()
        timed = generate_responses(policy, dialogue, chosen, batch_size=1, progress=False, **self.limits)
        return bootstrap([response.seconds for response in timed]).value

    def _load(self) -> tuple[Any, Any]:
        """The policy, on its device, and its dialogue."""
        if self._loaded is None:
            import torch

            from rollouts.dialogue import Dialogue, DialogueFormat
            from rollouts.policy import load_policy, load_tokenizer

            try:
                tokenizer = load_tokenizer(self.name_or_path)
                policy = cast(Any, load_policy(self.name_or_path, dtype=self.dtype))
            except (OSError, ValueError) as error:
                raise ConfigError(f"`{self.option}`: {error}") from error
            policy = policy.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
            self._loaded = policy, Dialogue(tokenizer, DialogueFormat.load(self.name_or_path))
        return self._loaded


def read_answers(path: Path, prompts: PromptSet, origin: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Answers of an earlier run to the same prompts, by index; a line that a kill cut short is asked again.

    Args:
        path: Of the answers.
        prompts: What is asked now.
        origin: What the answers depend on beside the prompt: policy and token limits.

    Raises:
        ConfigError: If they answer other prompts, or come from another policy or other options.
    """
    done: dict[int, dict[str, Any]] = {}
    if path.is_file():
        # As bytes: a kill may have left half a character, and answers hold line separators other than \n.
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
                index, prompt = row["index"], row["prompt"]
            except (ValueError, KeyError, TypeError):
                continue
            other = None
            if index >= len(prompts.instructions) or prompt != prompt_text(prompts.instructions[index]):
                other = "to other prompts"
            elif any(row.get(key) != value for key, value in origin.items()):
                other = "of another policy or with other options"
            if other is not None:
                raise ConfigError(f"{path} holds answers {other}. Choose another `output_dir` or remove it.")
            done[index] = row
        # Rewritten without damaged lines, so that appending starts on a line of its own.
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done.values())
        write_atomically(path, text.encode())
    return done


def policy_identity(name_or_path: str) -> str:
    """The policy's name and, of a folder, its fingerprint: training it further makes it another one."""
    from rollouts.policy import policy_fingerprint

    has_weights = any(any(Path(name_or_path).glob(f"*.{kind}")) for kind in ("safetensors", "gguf"))
    return f"{name_or_path} {policy_fingerprint(name_or_path)}" if has_weights else name_or_path


def prompt_text(instruction: Any) -> str:
    """The prompt of an instruction, which is an object of DABench or just the prompt."""
    return instruction if isinstance(instruction, str) else instruction["prompt"]
