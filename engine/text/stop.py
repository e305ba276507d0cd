"""StopMatcher: ends an output at a stop string and holds back what might be the start of one.

An Aho-Corasick automaton (Aho and Corasick, 1975): one step a character whatever the number of stop
strings, and its depth is exactly the number of characters that have to wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from millrace.engine.errors import InvalidRequest


class StopMatcher:
    """Watches one output, delta by delta, for the first of several stop strings.

    The match that is complete first wins; of those that end at the same character, the longest.
    So where the text is cut into deltas cannot change the result.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """`include_stop` releases the stop string itself too.

        Raises InvalidRequest if a stop string is empty.
        """
        if not all(stops):
            raise InvalidRequest("stop: a stop string is empty", "stop", "at least one character")
        self._include_stop = include_stop
        self._automaton = _Automaton(stops)
        self._state = 0
        self._held = ""  # always the last `depth[state]` characters: the prefix of some stop
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be released, the stop string that matched or None).

        Once a stop matched, the output is over: later calls release nothing.
        """
        if self._matched is not None:
            return "", self._matched
        step, stop_at = self._automaton.step, self._automaton.stop_at
        state = self._state
        seen = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            state = step(state, char)
            stop = stop_at[state]
            if stop is not None:
                self._matched, self._held = stop, ""
                return seen[: end if self._include_stop else end - len(stop)], stop
        self._state = state
        cut = len(seen) - self._automaton.depth[state]
        self._held = seen[cut:]
        return seen[:cut], None

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """Nodes are prefixes of the stop strings; node 0 is the empty one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stop_at: list[str | None] = [None]  # the longest stop string that ends in this node
        self.depth = [0]  # length of the node's prefix
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]  # the longest proper suffix that is a node too
        for stop in stops:
            self._insert(stop)
        self._link()

    def step(self, node: int, char: str) -> int:
        """The node of the longest suffix of (node's prefix + char)."""
        while char not in self._next[node]:
            if node == 0:
                return 0
            node = self._fail[node]
        return self._next[node][char]

    def _insert(self, stop: str) -> None:
        node = 0
        for char in stop:
            child = self._next[node].get(char)
            if child is None:
                child = len(self.depth)
                self._next[node][char] = child
                self._next.append({})
                self.depth.append(self.depth[node] + 1)
                self.stop_at.append(None)
                self._fail.append(0)
            node = child
        self.stop_at[node] = stop

    def _link(self) -> None:
        """Fill in `_fail` and inherit `stop_at`, nodes nearer to the root first."""
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                self._fail[child] = self.step(self._fail[node], char)
                queue.append(child)
            if self.stop_at[node] is None:
                self.stop_at[node] = self.stop_at[self._fail[node]]
