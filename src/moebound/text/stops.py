"""Stop texts in a stream: nothing goes out that may turn out to be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence

from moebound.errors import MoeboundError


class StopTexts:
    """One text, cut before the stop text that is complete first (of two at once, the longer).

    What goes out does not depend on how the text is cut into pieces. Raises MoeboundError for what
    is no text, for one text in the place of several (which would be its characters), and for an
    empty one, which would stop everything.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise MoeboundError(f"stop: expected texts that are not empty, found {stops!r}")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(the text that may go out, whether a stop text was found). After one, say no more."""
        if not self._stops:
            return piece, False
        self._held += piece
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at = min(found)
            text, self._held = self._held[:at], ""
            return text, True
        keep = max(self._overlap(stop) for stop in self._stops)
        at = len(self._held) - keep
        text, self._held = self._held[:at], self._held[at:]
        return text, False

    def finish(self) -> str:
        """What was held back, for a text that has ended otherwise."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """The longest end of what is held that `stop` begins with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
