"""An agent as an MCP server over stdio, so that any assistant can ask it which text-to-image model to call.

    python -m align.agents.mcp_server --model_name_or_path runs/rrhf --dataset data/dabench

and in the assistant's configuration

    {"mcpServers": {"t2i-align": {"command": "python", "args": ["-m", "align.agents.mcp_server", ...]}}}

Tools: `choose_model` (a prompt in, a call out, with alternatives and exports if asked for) and `find_models` (what the
catalogue has for some words). Standard output belongs to the protocol; everything else goes to standard error.
"""

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from align.agents.config import AGENT_ERRORS, AgentConfig
from align.agents.diffagent import DiffAgent
from align.agents.exports import EXPORTS, ExportError
from align.agents.filters import CallFilter, FilterError
from rewards.commandline import ConfigError, run_command
from rollouts.dialogue import DialogueError

_MAX_CHARS = 20_000


@dataclass
class McpConfig(AgentConfig):
    """Options of `python -m align.agents.mcp_server`."""


def main(config: McpConfig) -> None:
    """Load the agent and serve it on standard input and output."""
    try:
        import mcp  # noqa: F401
    except ImportError as error:
        raise ConfigError('An MCP server needs `pip install "t2i-align[mcp]"`.') from error
    with contextlib.redirect_stdout(sys.stderr):
        agent = config.load_agent()
    build_server(agent).run("stdio")


def build_server(agent: DiffAgent) -> Any:
    """The MCP server of an agent, not running yet."""
    from mcp.server.mcpserver import MCPServer

    server = MCPServer(
        "t2i-align",
        instructions="Chooses the text-to-image model and its parameters for what a person wants to see.",
    )

    @server.tool()
    async def choose_model(
        prompt: str,
        negative_prompt: str = "",
        filter: dict[str, Any] | None = None,
        top_k: int = 0,
        export: str | None = None,
    ) -> str:
        """Choose a text-to-image model and its parameters for a picture.

        Args:
            prompt: What the picture shows.
            negative_prompt: What it should not show.
            filter: What may be called: any of base_model, type (Checkpoint or LoRA), license, allow, deny, nsfw,
                samplers, max_steps, max_seconds.
            top_k: How many alternative models to list (0 to 50).
            export: Also give the call for a program: a1111, infotext, comfyui or diffusers.
        """
        with _told_to_the_assistant():
            for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
                if len(text) > _MAX_CHARS:
                    raise FilterError(f"`{name}` has {len(text):,} characters; {_MAX_CHARS:,} are allowed.")
            if not 0 <= top_k <= 50:
                raise FilterError(f"`top_k` must be 0 to 50, but is {top_k}.")
            if export is not None and export not in EXPORTS:
                raise FilterError(f"`export` must be one of {', '.join(EXPORTS)}, but is {export!r:.40}.")
            item = {"prompt": prompt, "negative prompt": negative_prompt}
            chosen = CallFilter.from_dict(filter or {})
            (answer,) = await asyncio.to_thread(agent.answer, [item], chosen, top_k=top_k)
            found = answer.to_dict()
            if export is not None:
                found[export] = EXPORTS[export](answer.call, answer.catalog, prompt, negative_prompt)
        return json.dumps(found, ensure_ascii=False)

    @server.tool()
    async def find_models(words: str, limit: int = 10) -> str:
        """Models of the catalogue whose name, description or example prompts are nearest to some words.

        Args:
            words: For example a style or a subject.
            limit: How many (1 to 50).
        """
        with _told_to_the_assistant():
            if not 1 <= limit <= 50:
                raise FilterError(f"`limit` must be 1 to 50, but is {limit}.")
            found = await asyncio.to_thread(agent.find_models, words[:_MAX_CHARS], limit)
        return json.dumps(found, ensure_ascii=False)

    return server


@contextlib.contextmanager
def _told_to_the_assistant() -> Generator[None]:
    """Expected errors are told in full; of others the protocol's library says only that there was one."""
    from mcp.server.mcpserver.exceptions import ToolError

    try:
        yield
    except (FilterError, ExportError, DialogueError, ImportError) as error:
        raise ToolError(str(error)) from error


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    run_command(main, McpConfig, errors=AGENT_ERRORS)
