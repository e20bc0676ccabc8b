"""Build ChatGenBench: freestyle chats with the prompt, model and arguments that they ask for (ChatGen Sec. 3.1).

    python -m align.bench.chatgen --source models.jsonl.gz --output data/chatgenbench
    python -m align.bench.chatgen --config configs/chatgen/bench.yaml --source models.jsonl.gz --output data/chats

Writes `catalog.jsonl`, `demonstrations.jsonl`, `chats/` (a `datasets.DatasetDict`: train, test), `review/queue.jsonl`
for people to look at (`python -m align.bench.chatgen.review`), `funnel.json`, `config.yaml` and a data card. A build
that was killed goes on where it was when started again, and pays for no answer of a language model twice.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from align.bench.cached_http import RequestError
from align.bench.chatgen.build import Summary, build
from align.bench.chatgen.config import ChatGenBenchConfig
from align.bench.chatgen.llm_player import BudgetError
from align.bench.chatgen.review_store import ReviewError
from align.bench.llm_client import LLMEndpointError
from align.bench.sources import SourceError
from rewards.checkpoints import CheckpointError
from rewards.commandline import ConfigError, run_command

logger = logging.getLogger(__name__)


ERRORS = (SourceError, RequestError, LLMEndpointError, BudgetError, ReviewError, CheckpointError)
"""What ends a build with one line."""


def main(config: ChatGenBenchConfig) -> None:
    """Build and say what came out."""
    report(config, lambda: build(config))


def report(config: ChatGenBenchConfig, make: Callable[[], Summary]) -> None:
    """Make the data set and say what came out.

    Raises:
        ConfigError: A package is missing, or the output can't be written.
    """
    try:
        summary = make()
    except ImportError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"`output` {config.output} can't be written: {error}") from error
    for name in ("train", "test"):
        counts = summary.rows[name]
        logger.info("%s: %s chats %s", name, f"{sum(counts.values()):,}", counts)
    logger.info("%s models %s; see %s", f"{sum(summary.models.values()):,}", summary.models, Path(config.output))


if __name__ == "__main__":
    run_command(main, ChatGenBenchConfig, errors=ERRORS)
