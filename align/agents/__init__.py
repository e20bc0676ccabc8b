"""Trained policies as agents that people and programs call.

from align.agents import DiffAgent

agent = DiffAgent.from_pretrained("runs/rrhf", catalog="data/dabench/catalog.jsonl")
agent.call(["a cute corgi, pixel art"])
"""

from align.agents.diffagent import Alternative, Answer, DiffAgent
from align.agents.filters import CallFilter, FilterError

__all__ = ["Alternative", "Answer", "CallFilter", "DiffAgent", "FilterError"]
