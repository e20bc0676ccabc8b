"""One epoch of SFT: this toolkit's data path beside TRL's own, with the same model, rows and batch size.

    python benchmarks/sft.py --json

The peer is TRL's `SFTTrainer` as `trl sft` runs it: conversational prompt-completion rows, tokenized by TRL, batches in
random order. Ours is what `align/sft.py` does with `train_sampling_strategy: group_by_length`. The ratio is TRL's
training time over ours (> 1: we are faster).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine
from trl import SFTConfig, SFTTrainer

from align.bench.config import DABenchConfig
from align.bench.dabench import build
from align.pairs import encode_pairs, load_pairs, response_text
from align.scratch import ScratchConfig, build_from_scratch, train_bpe_tokenizer
from pocket.community import write_dump
from rollouts.dialogue import Dialogue

ROWS = 256


def train(folder: Path, rows: Any, tokenizer: Any, **options: Any) -> float:
    """Seconds of one epoch on these rows, without loading or saving."""
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        max_length=512,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    model = build_from_scratch(ScratchConfig(vocab_size=4096), tokenizer)
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def main() -> None:
    """Time both and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="Print one JSON object as the last line.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dump(folder / "models.jsonl")
        build(DABenchConfig(source=str(folder / "models.jsonl"), output=str(folder / "dabench"), plots=False))
        rows = load_pairs(folder / "dabench", "SD 1.5")["sft"].select(range(ROWS))
        texts = [text for r in rows for text in (r["instruction"]["prompt"], response_text(r["api"]))]
        tokenizer = train_bpe_tokenizer(texts, vocab_size=4096)
        ours = encode_pairs(rows, Dialogue(tokenizer), 512, what="benchmark")
        trl = rows.map(
            lambda row: {
                "prompt": [{"role": "user", "content": row["instruction"]["prompt"]}],
                "completion": [{"role": "assistant", "content": response_text(row["api"])}],
            },
            remove_columns=rows.column_names,
        )
        # Twice each and the faster one: the first run pays for warming up.
        seconds = {
            "ours": min(
                train(folder / "ours", ours, tokenizer, train_sampling_strategy="group_by_length") for _ in range(2)
            ),
            "trl": min(train(folder / "trl", trl, tokenizer, completion_only_loss=True) for _ in range(2)),
        }
    ratio = seconds["trl"] / seconds["ours"]
    print(f"{ROWS} rows: {seconds}")
    if args.json:
        print(json.dumps({"name": "sft", "machine": machine(), "seconds": seconds, "ratios": {"trl": ratio}}))


if __name__ == "__main__":
    main()
