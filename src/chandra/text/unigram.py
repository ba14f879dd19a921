"""SentencePiece's unigram model: the most probable way to cut the text into tokens (Kudo 2018)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from chandra.text.bpe import spaced, spelled
from chandra.text.vocabulary import Vocabulary


class UnigramEncoder:
    """Viterbi search by the `tokenizers` library. `scores`: float32 [vocab], log probabilities; `matchable`: bool
    [vocab], the tokens that text can turn into."""

    def __init__(
        self, vocab: Vocabulary, scores: NDArray[np.float32], matchable: NDArray[np.bool_], unk_id: int, add_space: bool
    ) -> None:
        from tokenizers.models import Unigram  # here: the other kinds do without it

        names = (vocab[id] if matchable[id] else f"\U0010ffff{id}" for id in range(len(vocab)))
        self._model = Unigram(list(zip(names, map(float, scores), strict=True)), unk_id)
        self._vocab, self._unk_id, self._add_space = vocab, unk_id, add_space

    def encode(self, text: str, first: bool) -> Iterable[int]:
        for token in self._model.tokenize(spaced(text, first and self._add_space)):
            if token.id == self._unk_id:
                yield from spelled(token.value, self._vocab, self._unk_id)
            else:
                yield token.id
