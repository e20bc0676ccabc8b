"""Trained policies as agents that people and programs call.

from align.agents import DiffAgent

agent = DiffAgent.from_pretrained("runs/rrhf", catalog="data/dabench/catalog.jsonl")
agent.call(["a cute corgi, pixel art"])
"""

from align.agents.chatgen import ChatGenAgent, EvoAgent
from align.agents.chatgen_base import BaseAgent
from align.agents.diffagent import Alternative, Answer, DiffAgent
from align.agents.filters import CallFilter, FilterError
from align.agents.plans import Plan

__all__ = [
    "Alternative",
    "Answer",
    "BaseAgent",
    "CallFilter",
    "ChatGenAgent",
    "DiffAgent",
    "EvoAgent",
    "FilterError",
    "Plan",
]
