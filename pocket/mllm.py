"""A policy that sees pictures, from nothing and at toy size: an InternVL of 0.6M parameters for pictures of 64 pixels.

    python -m pocket.mllm --dataset data/chatgenbench --output models/pocket-mllm
    accelerate launch align/sft.py --config configs/pocket/chatgen_mllm.yaml --model_name_or_path models/pocket-mllm \\
        --dataset data/chatgenbench --output_dir runs/evo

The tokenizer is trained on the chats; the weights are random, until `align/sft.py` trains them. Every class is
transformers' own, as in OpenGVLab/InternVL3-2B-hf.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from align.bench.chatgen.schema import chat_text
from align.chats import load_chats, plan_text
from align.pairs import DataError
from align.scratch import BOS, IM_END, IM_START, PAD, train_bpe_tokenizer
from rewards.commandline import run_command

if TYPE_CHECKING:
    from transformers import InternVLForConditionalGeneration, InternVLProcessor, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass
class MLLMConfig:
    """Options of `python -m pocket.mllm`."""

    dataset: str = field(metadata={"help": "ChatGenBench folder: the tokenizer learns its chats and plans."})
    output: str = field(metadata={"help": "Folder of the policy and its processor."})
    seed: int = field(default=0, metadata={"help": "Of the weights."})
    vocab_size: int = field(default=2048, metadata={"help": "Tokens of text, at most."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the language model."})
    num_layers: int = field(default=3, metadata={"help": "Of the language model."})
    vision_size: int = field(default=64, metadata={"help": "Width of the vision tower, which has two layers."})
    picture_side: int = field(default=64, metadata={"help": "Pixels that pictures are resized to; a multiple of 16."})
    max_position_embeddings: int = field(default=2048, metadata={"help": "Longest sequence, in tokens."})

    def __post_init__(self) -> None:
        if self.picture_side < 16 or self.picture_side % 16:
            raise ValueError(f"`picture_side` must be a multiple of 16, but is {self.picture_side}.")
        for name, divisor in (("hidden_size", 8), ("vision_size", 4)):  # four heads, of rotated pairs in the text
            if getattr(self, name) < divisor or getattr(self, name) % divisor:
                raise ValueError(f"`{name}` must be a multiple of {divisor}, but is {getattr(self, name)}.")


def main(config: MLLMConfig) -> None:
    """Write policy and processor."""
    rows = load_chats(config.dataset)["train"]
    texts = (text for row in rows for text in (chat_text(row["messages"], None), plan_text(row)))
    model, processor = build_mllm(texts, config)
    model.save_pretrained(config.output)
    processor.save_pretrained(config.output)
    logger.info("%s: %.2fM parameters", Path(config.output), model.num_parameters() / 1e6)


def build_mllm(
    texts: Iterable[str], config: MLLMConfig
) -> tuple["InternVLForConditionalGeneration", "InternVLProcessor"]:
    """The policy in evaluation mode, with random weights, and its processor. Equal seeds give equal weights.

    A picture is cut into patches of 8 pixels, of which four make a token: 16 tokens for 64x64 pixels.

    Args:
        texts: That the tokenizer is trained on.
        config: Sizes; `dataset` and `output` don't matter.
    """
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )

    tokenizer = picture_tokenizer(texts, config.vocab_size)
    side, tokens = config.picture_side, (config.picture_side // 16) ** 2
    processor = InternVLProcessor(
        # One tile: InternVL's processor cuts large pictures into several by default.
        image_processor=GotOcr2ImageProcessor(size={"height": side, "width": side}, min_patches=1, max_patches=1),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size={"height": side, "width": side}),
        image_seq_length=tokens,
        chat_template=_TEMPLATE,
    )
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=config.hidden_size, intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.num_layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=config.max_position_embeddings, **ids,
    )  # fmt: skip
    vision = InternVLVisionConfig(
        hidden_size=config.vision_size, intermediate_size=3 * config.vision_size, num_hidden_layers=2,
        num_attention_heads=4, image_size=[side, side], patch_size=[8, 8],
    )  # fmt: skip
    whole = InternVLConfig(
        vision_config=vision, text_config=text, image_seq_length=tokens, downsample_ratio=0.5,
        image_token_id=processor.image_token_id, dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # not torch.manual_seed, which would also reseed every GPU
        torch.default_generator.manual_seed(config.seed)
        model = InternVLForConditionalGeneration(whole)
    for name, number in ids.items():
        setattr(model.generation_config, name, number)
    return model.eval(), processor


def picture_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer with ChatML's tokens and InternVL's for pictures."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe_tokenizer(texts, vocab_size=vocab_size).backend_tokenizer,
        bos_token=BOS,
        eos_token=IM_END,
        pad_token=PAD,
        extra_special_tokens={"turn_start_token": IM_START} | IMAGE_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


if __name__ == "__main__":
    run_command(main, MLLMConfig, errors=(DataError,))
