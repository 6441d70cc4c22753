"""From files to blocks of tokens, and the plain loop: one call for all texts, held in memory."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from calm_dist.benchmark.compare import Pair, Values
from calm_dist.text.corpus import (
    ShuffledDocuments,
    iter_documents,
    pack_blocks,
    standard_library_documents,
)
from calm_dist.text.formats import Document
from calm_dist.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TEXT_BYTES = 4 << 20
VOCAB_SIZE = 8192
BLOCK_SIZE = 8192


def tokenizing_pairs(corpus: Sequence[str], tokenizer: str | None) -> Iterator[Pair]:
    """Lines of JSON of about 4 MiB of text.

    Args:
        corpus: where the text is from; empty: Python's standard library.
        tokenizer: a file; None: a byte-level BPE of 8,192 entries, trained on the text.
    """
    documents = _some(iter_documents(corpus) if corpus else iter(standard_library_documents()))
    with tempfile.TemporaryDirectory(prefix="calm-tokenizing-") as directory:
        folder = Path(directory)
        if tokenizer is None:
            texts = (document.text for document in documents)
            loaded = train_tokenizer(texts, VOCAB_SIZE, folder / "tokenizer.json")
        else:
            loaded = load_tokenizer(tokenizer)
        name = f"tokenizing, {loaded.vocab_size:,} entries"
        whole = Document("all", "\n\n".join(document.text for document in documents))
        file, single = folder / "documents.jsonl", folder / "single.jsonl"
        _write(file, documents)
        _write(single, [whole])
        yield _pair(name, file, documents, loaded)
        yield _pair(f"{name}, all text one document", single, [whole], loaded)
        if loaded.path.suffix == ".json":
            other = _only_for_tokenizers(loaded, folder / "prefixed")
            yield _pair(f"{name}, blank put before texts (not in tiktoken)", file, documents, other)
        if importlib.util.find_spec("datatrove") and loaded.path.suffix == ".json":
            pair = _pair(f"{name}; plain: datatrove", file, documents, loaded)
            plain = _datatrove(folder, file, loaded)
            yield Pair(pair.name, pair.ours, plain, pair.work, pair.unit, pair.sizes)


def _some(documents: Iterator[Document]) -> list[Document]:
    sizes: Counter[str] = Counter()

    def is_enough(document: Document) -> bool:
        sizes["bytes"] += len(document.text.encode())
        return sizes["bytes"] - len(document.text.encode()) < TEXT_BYTES

    return list(takewhile(is_enough, documents))


def _write(file: Path, documents: Sequence[Document]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for document in documents:
            stream.write(json.dumps({"id": document.id, "text": document.text}) + "\n")


def _only_for_tokenizers(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """A variant that tiktoken cannot run: it puts a blank before each text."""
    values = json.loads(tokenizer.path.read_text(encoding="utf-8"))
    step = values["pre_tokenizer"]
    (step["pretokenizers"][-1] if step["type"] == "Sequence" else step)["add_prefix_space"] = True
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return load_tokenizer(folder, tokenizer.begin_token, tokenizer.end_token)


def _pair(name: str, file: Path, documents: Sequence[Document], tokenizer: Tokenizer) -> Pair:
    """Both return the number of tokens, begin and end tokens not counted."""
    texts = [document.text for document in documents]

    def ours() -> Values:
        counts: Counter[str] = Counter()
        shuffled = ShuffledDocuments([file], 0)
        for _ in pack_blocks(shuffled, tokenizer, BLOCK_SIZE, 4, 0, counts):
            pass
        return [torch.tensor([counts["tokens"]])]

    def plainly() -> Values:
        return [torch.tensor([sum(map(len, encode(texts)))])]

    encode = _plain_loop(tokenizer)
    size = sum(len(text.encode()) for text in texts)
    sizes = {"bytes": size, "documents": len(texts), "vocab_size": tokenizer.vocab_size}
    return Pair(name, ours, plainly, size / 1e6, "MB", sizes)


def _plain_loop(tokenizer: Tokenizer) -> Callable[[list[str]], list[Any]]:
    if tokenizer.path.suffix != ".json":
        return tokenizer.tokens_of
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    library.encode_special_tokens = True

    def encode(texts: list[str]) -> list[Any]:
        return [found.ids for found in library.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def _datatrove(folder: Path, file: Path, tokenizer: Tokenizer) -> Callable[[], None]:
    """Its reader of lines of JSON and its tokenizer, which writes a file of 16 or 32 bit tokens."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    def plainly() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            pipeline = [
                JsonlReader(str(file), compression=None),
                DocumentTokenizer(
                    f"{out}/tokens",
                    tokenizer_name_or_path=str(tokenizer.path),
                    eos_token=tokenizer.end_token,
                ),
            ]
            LocalPipelineExecutor(pipeline, logging_dir=f"{out}/logs", skip_completed=False).run()

    return plainly
