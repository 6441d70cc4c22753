"""``a.b=value`` overrides on top of a recipe's values."""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from calm_dist.errors import RecipeError, shown
from calm_dist.recipe.yaml_text import parse_yaml


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], recipe_type: type[BaseModel]
) -> dict[str, Any]:
    """A copy of ``values`` with each ``a.b=value`` set; later overrides win.

    For a field of ``recipe_type`` that holds text, such as a path, the value is everything after
    the equals sign, verbatim: blanks, quotes and ``#`` belong to it. If such a field may be absent,
    an empty value or ``null`` makes it so. If it may also be a list, text that begins with ``[`` or
    ``{`` and is a YAML list or mapping is parsed. The values of all other fields are YAML.

    Raises:
        RecipeError: an override is malformed, or its path leads through a value without fields.
    """
    values = copy.deepcopy(values)
    kinds = _field_kinds(recipe_type)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        names = dotted.split(".")
        if not equals or not all(names):
            raise RecipeError(
                f"override {shown(override)}: not of the form section.field=value, for example "
                "training.steps=20"
            )
        section = values
        for name in names[:-1]:
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
            if not isinstance(section, dict):
                raise RecipeError(
                    f"override {shown(override)}: {name} has no fields of its own; override it "
                    "as a whole"
                )
        source = f"override {shown(override)}"
        section[names[-1]] = _value(text, kinds.get(dotted, set()), source)
    return values


def _value(text: str, kinds: set[Any], source: str) -> Any:
    if str not in kinds:
        return parse_yaml(text, source=source)
    if types.NoneType in kinds and text in ("", "null"):
        return None
    if kinds - {str, types.NoneType} and text.startswith(("[", "{")):
        try:
            value = parse_yaml(text, source=source)
        except RecipeError:
            return text
        return value if isinstance(value, list | dict) else text
    return text


def _field_kinds(section: type[BaseModel], prefix: str = "") -> Mapping[str, set[Any]]:
    """The types that each field allows, by dotted name."""
    kinds: dict[str, set[Any]] = {}
    for attribute, info in section.model_fields.items():
        name = prefix + (info.alias or attribute)
        allowed = _plain_types(info.annotation)
        # For a name that several kinds of model have: whatever any of them allows.
        kinds[name] = kinds.get(name, set()) | allowed
        for kind in allowed:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                for inner, types_of_inner in _field_kinds(kind, f"{name}.").items():
                    kinds[inner] = kinds.get(inner, set()) | types_of_inner
    return kinds


def _plain_types(annotation: Any) -> set[Any]:
    """``{str, NoneType}`` for ``Annotated[str, ...] | None``; the origin of generic types."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain_types(arguments[0])
    if origin in (Union, types.UnionType):
        return set().union(*map(_plain_types, arguments))
    return {origin or annotation}
