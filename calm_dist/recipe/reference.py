"""Generate the reference of recipes, ``docs/recipes.md``, from their types.

python -m calm_dist.recipe.reference > docs/recipes.md
"""

from __future__ import annotations

import argparse
import json
import re
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from calm_dist.recipe import (
    AutoencoderModel,
    AutoencoderSize,
    BackboneModel,
    CalmModel,
    Checkpoint,
    Data,
    DataSource,
    Evaluation,
    HeadRecipe,
    Health,
    Logging,
    Parallel,
    Recipe,
    Run,
    Training,
    TransformerModel,
    WeightFrom,
)
from calm_dist.schema import Section

_INTRODUCTION = """\
# Recipes

Every field of a recipe. Generated from the types in `calm_dist/recipe/sections.py` by \
`python -m calm_dist.recipe.reference > docs/recipes.md`; a test keeps the two in step.

A recipe is a YAML file of sections, at most 1 MiB and without aliases (`*name`). The command \
line overrides single fields by their dotted names:

```bash
python tools/train.py recipes/calm_m.yaml training.steps=1000 model.head.kind=flow --dry-run
python tools/train.py recipes/calm_m.yaml 'data.path=[{path: data/latents/books, weight: 3}, \
{path: data/latents/web}]' --dry-run
```

For a field that holds text, such as a path, the value is everything after the equals sign, \
verbatim: blanks, quotes and `#` belong to it. If such a field may be absent, an empty value or \
`null` makes it so. A value of `data.path` that begins with `[` or `{` and is a YAML list or \
mapping is parsed; write `./[a]` for a store called `[a]`. All other values are YAML.

Unknown fields, wrong types, values out of range and impossible combinations are reported before \
anything starts, all at once (the first ten if there are more), each with the remedy. For \
combinations that are not supported, see [layouts.md](layouts.md#refused-with-the-reason). A run \
writes its resolved recipe to `recipe.yaml` in its directory; in a file of that name, fields that \
an earlier version accepted and ignored are left out with a warning. `--dry-run` shows the plan \
without running.

A field whose default is – may be absent; its meaning says what applies then."""

_PLAIN = {int: "integer", float: "number", str: "text", bool: "true, false"}


def reference() -> str:
    """The whole page in Markdown."""
    own = [name for name in CalmModel.model_fields if name not in BackboneModel.model_fields]
    parts = [
        _INTRODUCTION,
        _section("run", Run),
        "## model\n\nWhat is trained. `model.kind` decides which of these fields exist.",
        _table(
            "### Both language models: `kind: calm` and `kind: transformer`\n\n"
            f"{_summary(BackboneModel)} {_summary(TransformerModel)}",
            "model.",
            BackboneModel,
        ),
        _table(f"### `kind: calm`\n\n{_summary(CalmModel)}", "model.", CalmModel, own),
        _table(f"### `model.head`\n\n{_summary(HeadRecipe)}", "model.head.", HeadRecipe),
        _table(
            f"### `model.autoencoder_size`\n\n{_summary(AutoencoderSize)}",
            "model.autoencoder_size.",
            AutoencoderSize,
        ),
        _table(
            f"### `kind: autoencoder`\n\n{_summary(AutoencoderModel)}", "model.", AutoencoderModel
        ),
        _section("data", Data),
        _table(f"### A store of a mixture\n\n{_summary(DataSource)}", "data.path[…].", DataSource),
        _table(
            f"### A weight that changes\n\n{_summary(WeightFrom)}",
            "data.path[…].weight[…].",
            WeightFrom,
        ),
        _section("parallel", Parallel),
        _section("training", Training),
        _table("## precision", "", Recipe, ["precision"]),
        _section("checkpoint", Checkpoint),
        _section("logging", Logging),
        _section("health", Health),
        _section("evaluation", Evaluation),
    ]
    return "\n\n".join(parts) + "\n"


def _section(name: str, section: type[Section]) -> str:
    return _table(f"## {name}\n\n{_summary(section)}", f"{name}.", section)


def _summary(section: type[Section]) -> str:
    """The docstring of a section on one line, in Markdown."""
    return _markdown(section.__doc__ or "")


def _markdown(text: str) -> str:
    return re.sub(r"``([^`]+)``", r"`\1`", " ".join(text.split()))


def _table(
    heading: str, prefix: str, section: type[Section], names: Iterable[str] | None = None
) -> str:
    lines = [heading, "", "| field | values | default | meaning |", "|---|---|---|---|"]
    for name in names or section.model_fields:
        field = section.model_fields[name]
        if not field.description and name != "kind":
            raise ValueError(f"{section.__name__}.{name}: has no docstring")
        cells = [
            f"`{prefix}{field.alias or name}`",
            _examples(field.examples) or _values(field.annotation, field.metadata),
            _default(field),
            _markdown(field.description or "What is trained."),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _examples(values: Iterable[Any] | None) -> str:
    """Examples of an open set of values."""
    return ", ".join([*(f"`{value}`" for value in values), "…"]) if values else ""


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "**required**"
    if value is None:
        return "–"
    if isinstance(value, Section):
        return "its fields'"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _values(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """The values that a type allows, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        kinds = [_values(kind, metadata) for kind in arguments if kind is not types.NoneType]
        return " or ".join(kinds)
    if origin is tuple:
        return f"list: {_values(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"`{{{', '.join(annotation.model_fields)}}}`"
    return ", ".join([_PLAIN[annotation], *_limits(metadata, annotation is int)])


def _limits(metadata: Iterable[Any], whole: bool) -> list[str]:
    limits: list[str] = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            limits += _limits(item.metadata, whole)
        if (bound := getattr(item, "gt", None)) is not None:
            limits.append(f"from {bound + 1}" if whole else f"above {bound}")
        if (bound := getattr(item, "ge", None)) is not None:
            limits.append(f"from {bound}")
        if (bound := getattr(item, "lt", None)) is not None:
            # The limit of every whole number.
            limits += [] if bound == 2**63 else [f"below {bound}"]
        if (bound := getattr(item, "le", None)) is not None:
            limits.append(f"at most {bound:,.0f}")
    return limits


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(reference(), end="")
