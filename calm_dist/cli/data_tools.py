"""What ``verify_data.py`` and ``inspect_data.py`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calm_dist.cli.console import announce
from calm_dist.data.inspection import (
    decoder,
    describe_block,
    find_autoencoder,
    read_block,
    tokenizer_of,
)

_SHOWN_CHARACTERS = 600


def describe(store: str, number: int, autoencoder: Path | None, device: str) -> dict[str, Any]:
    """A block of a store, as `describe_block` gives it, decoded if its autoencoder is there.

    Raises:
        DataError: the store, the block or the autoencoder is missing, damaged, or another one.
    """
    meta, tokenizer = tokenizer_of(store)
    directory = find_autoencoder(meta, autoencoder)
    block = read_block(store, number)
    if directory is None:
        found = describe_block(block, meta, tokenizer, None)
        if meta.autoencoder is not None:
            found["not_decoded"] = (
                f"the autoencoder is no longer at {meta.autoencoder.file}; --autoencoder DIR names "
                "another place"
            )
        return found
    announce("loading the autoencoder ...")
    from calm_dist.interop.huggingface import load_autoencoder
    from calm_dist.parallel.launch import own_device

    model = load_autoencoder(directory).to(own_device(device)).eval()
    return describe_block(block, meta, tokenizer, decoder(model))


def show_sample(number: int, block: dict[str, Any]) -> None:
    """Print a block's text beside what the decoder makes of it."""
    print(f"\nblock {number}, {len(block['tokens'])} tokens")
    if "mean_std" in block:
        print(
            f"posterior: standard deviation {block['mean_std']:.3f} on average, "
            f"{block['unused_dimensions']} dimensions unused"
        )
    if "token_accuracy" in block:
        print(f"decoded from the means: {block['token_accuracy']:.2%} of the tokens")
    if "not_decoded" in block:
        print(f"not decoded: {block['not_decoded']}")
    print(f"\ntext:    {_shortened(block['text'])}")
    if "decoded_text" in block:
        print(f"decoded: {_shortened(block['decoded_text'])}")


def show_patches(block: dict[str, Any], count: int) -> None:
    """Print the first patches, one in a line."""
    if not count:
        return
    has_latents = "mean_std" in block
    print("\npatch  " + ("|mean|    std (min to max)  " if has_latents else "") + "tokens, text")
    for i, patch in enumerate(block["patches"][:count]):
        spread = ""
        if has_latents:
            spread = (
                f"{patch['mean_norm']:6.2f}  {patch['std']:5.3f} ({patch['std_min']:5.3f} to "
                f"{patch['std_max']:5.3f})  "
            )
        other = ""
        if patch.get("decoded", patch["tokens"]) != patch["tokens"]:
            other = f"   decoded: {patch['decoded']} {patch['decoded_text']!r}"
        print(f"{i:5}  {spread}{patch['tokens']} {patch['text']!r}{other}")
    if (left := len(block["patches"]) - count) > 0:
        print(f"... {left} more; --patches shows them")


def _shortened(text: str) -> str:
    shown = repr(text[:_SHOWN_CHARACTERS])
    return shown if len(text) <= _SHOWN_CHARACTERS else f"{shown} ... ({len(text):,} characters)"
