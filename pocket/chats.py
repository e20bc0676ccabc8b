"""ChatGenBench of the pocket world: every chat asks for exactly the scene of its prompt.

    python -m pocket.chats --source dump/models.jsonl.gz --output chatgenbench --references folder --images dump/images

The builder is `align.bench.chatgen`, with all of its options; only the words are this world's
(`pocket.role_player.SceneWording`), unless language models write (`generators`).
"""

import logging

from align.bench.chatgen.__main__ import ERRORS, report
from align.bench.chatgen.build import build
from align.bench.chatgen.config import ChatGenBenchConfig
from pocket.role_player import SceneWording
from rewards.commandline import run_command

logger = logging.getLogger(__name__)


def main(config: ChatGenBenchConfig) -> None:
    """Build and say what came out."""
    report(config, lambda: build(config, wording=SceneWording()))


if __name__ == "__main__":
    run_command(main, ChatGenBenchConfig, errors=ERRORS)
