"""The tool that an agent calls, and the tool that an agent is, as JSON Schemas."""

from typing import Any

from rollouts.api import APICall

TOOL_NAME = "text_to_image"


def tool_schema() -> dict[str, Any]:
    """A T2I API call as an entry of OpenAI's `tools`: its arguments are the nine fields of DABench."""
    schema = APICall.model_json_schema(by_alias=True)
    schema.pop("title", None)
    schema.pop("description", None)
    return {
        "type": "function",
        "function": {
            "name": TOOL_NAME,
            "description": "Draw a picture with a catalogued text-to-image model.",
            "parameters": schema,
        },
    }
