"""In which order units are used, learnt from the uses themselves."""

from __future__ import annotations

_Use = tuple[str, int]


class AccessOrder:
    """Predicts the next uses from what followed the last time that the same few came before.

    Nothing marks where a pass begins: forwards, backwards, optimizer steps, evaluation between training steps, modules
    that are called twice and branches are all sequences that come again.
    """

    #: So many uses tell a place in the sequence; where they are new, fewer do. Long ones tell a block's forward from
    #: its recomputation in the backward, which is followed by others.
    CONTEXTS = (16, 8, 4, 2, 1)

    def __init__(self, capacity: int = 100_000) -> None:
        """``capacity``: uses that are remembered; at least two passes are needed."""
        self._capacity = capacity
        # A use is the unit and how often it was used just before: else a run of uses would look alike everywhere.
        self._history: list[_Use] = []
        self._names: list[str] = []  # the same without the numbers
        self._known: dict[_Use, _Use] = {}  # each use once, for most come again and again
        self._places: dict[int, int] = {}  # by the hash of a context: a clash costs a wrong guess
        self._place = -1

    def visit(self, name: str) -> None:
        """Notes a use."""
        if len(self._history) >= self._capacity:
            kept = self._history[self._capacity // 2 :]
            self._history, self._names, self._places = [], [], {}
            for earlier in kept:
                self._append(earlier)
        last, repeats = self._history[-1] if self._history else ("", -1)
        self._append((name, repeats + 1 if name == last else 0))

    def upcoming(self, limit: int) -> list[str]:
        """The next uses that are expected, the first first; empty where nothing like the present was seen before."""
        if self._place < 0:
            return []
        return self._names[self._place + 1 : self._place + 1 + limit]

    def _append(self, use: _Use) -> None:
        self._history.append(self._known.setdefault(use, use))
        self._names.append(use[0])
        contexts = [hash((length, *self._history[-length:])) for length in self.CONTEXTS]
        self._place = next((self._places[context] for context in contexts if context in self._places), -1)
        self._places.update(dict.fromkeys(contexts, len(self._history) - 1))
