"""Blocks of a text for evaluation, made in memory: a store that was not written.

Two protocols: ``own`` joins documents as this package's stores do; ``published`` as the authors'
evaluation script does.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from calm_dist.data.store import StoreMeta, StorePlan, TokenizerInfo, fingerprint
from calm_dist.errors import UserError
from calm_dist.text.corpus import Document, corpus_sha256, iter_documents, pack_blocks
from calm_dist.text.corpus_files import find_files
from calm_dist.text.formats import TEXT_AND_ID, Reading

if TYPE_CHECKING:
    from calm_dist.text.tokenizer import Tokenizer

TextProtocol = Literal["own", "published"]

PUBLISHED_BLOCK_SIZE = 8192
"""Tokens of a block with which published scores were reproduced: 2,048 patches of 4."""

_GROUP_OF_DOCUMENTS = 1000
"""Documents that the authors' script packs together; it drops the last, incomplete block."""


class Blocks(Protocol):
    """What is scored: a `data.stream.Store`, or `TextBlocks`."""

    @property
    def meta(self) -> StoreMeta: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class TextBlocks:
    """The blocks of text files, in the order of the files.

    Args:
        paths: files, directories and globs.
        tokenizer: the model's.
        block_size: tokens per block, a multiple of ``patch_size``.
        patch_size: K of the CALM, or of the CALM that a Transformer is compared with.
        protocol: ``own``: 1..K begin tokens before and one end token after each document (K is
            ``patch_size``; see `data.corpus.pack_blocks`). ``published``: one begin token before
            each document and no end token, as the authors' tokenizer does it.
        reading: what of the files is a document.

    Raises:
        DataError: a file cannot be read, or the text cannot be encoded.
        UserError: the text fills no block, or ``block_size`` is not a multiple of ``patch_size``.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        tokenizer: Tokenizer,
        *,
        block_size: int,
        patch_size: int,
        protocol: TextProtocol = "own",
        reading: Reading = TEXT_AND_ID,
    ) -> None:
        if block_size % patch_size:
            raise UserError(
                f"block size {block_size}: is not a multiple of the patch size {patch_size}"
            )
        files = find_files(list(paths), reading)
        documents = iter_documents(files, reading)
        if protocol == "published":
            blocks = _published_blocks(documents, tokenizer, block_size)
        else:
            blocks = pack_blocks(documents, tokenizer, block_size, patch_size, seed=0)
        self._blocks = list(blocks)
        if not self._blocks:
            raise UserError(
                f"{', '.join(map(str, paths))}: fills no block of {block_size} tokens; give more "
                "text, or a smaller --block-size"
            )
        plan = StorePlan(
            variant="tokens",
            block_size=block_size,
            patch_size=patch_size,
            latent_size=None,
            vocab_size=tokenizer.vocab_size,
            tokenizer=TokenizerInfo.of(tokenizer),
            autoencoder=None,
            corpus_sha256=corpus_sha256(files),
            seed=0,
        )
        count = len(self._blocks)
        fields = plan.to_dict() | {"num_blocks": count, "num_tokens": count * block_size}
        content = hashlib.sha256(b"".join(block.tobytes() for block in self._blocks)).digest()
        self.meta = StoreMeta(**fields, fingerprint=fingerprint(fields, content))

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "tokens": self._blocks[index]}


def _published_blocks(
    documents: Iterable[Document], tokenizer: Tokenizer, block_size: int
) -> Iterator[np.ndarray]:
    """Blocks [block_size] of uint32 as the authors' script cuts them."""
    remaining = iter(documents)
    while group := list(itertools.islice(remaining, _GROUP_OF_DOCUMENTS)):
        pieces = []
        for tokens in tokenizer.encode_batch([document.text for document in group]):
            pieces.append(np.array([tokenizer.begin_id, *tokens], np.uint32))
        joined = np.concatenate(pieces)
        count = len(joined) // block_size
        yield from joined[: count * block_size].reshape(count, block_size)
