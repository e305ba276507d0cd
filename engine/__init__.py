"""The application: everything that knows models, devices, processes and sockets.

`from millrace.engine import LLM, SamplingParams` is the offline API; `millrace serve` the server.
"""

from typing import TYPE_CHECKING, Any

from millrace.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from millrace.engine.llm import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Load LLM, and torch with it, when it is first asked for: the front end needs neither."""
    if name == "LLM":
        from millrace.engine.llm import LLM

        return LLM
    raise AttributeError(name)
