"""Text from token ids as they come: whole characters only, and together what the tokenizer decodes at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no whole character, yet."""


class Pieces:
    """Decodes behind the last text that was given, so that a long reply costs no more per token than a short one.

    What a token adds is the text of the last tokens with it, less their text without it: a SentencePiece decoder drops
    the space at the start of what it is given. context: ids before the reply, whose last word it may go on with.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self.backend = tokenizer.backend_tokenizer  # the tokenizer's own decode takes ten times as long
        self.ids = list(context[-16:])
        self.begin, self.given = 0, len(self.ids)  # ids[begin:given] are given out, and what follows is decoded by them

    def add(self, token: int) -> str:
        """The text that is whole with this token; empty while a character, or a special token, is all there is."""
        self.ids.append(token)
        text = self._new()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self.begin, self.given = self.given, len(self.ids)
        return text

    def rest(self) -> str:
        """What is left at the end: half a character, if anything, as the decoder writes it."""
        text = self._new()
        self.begin = self.given = len(self.ids)
        return text

    def _new(self) -> str:
        """The text of the ids that are not given out."""
        known, whole = self._decode(self.ids[self.begin : self.given]), self._decode(self.ids[self.begin :])
        return whole[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self.backend.decode(ids, skip_special_tokens=True)
        return text
