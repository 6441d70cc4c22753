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

    A field of ``recipe_type`` that holds text, such as a path, gets what follows the equals sign
    as it is, to the last blank, quote and ``#``. Where such a field may be absent, nothing or
    ``null`` means that. Where it may also be a list, what begins with ``[`` or ``{`` and is a list
    or a mapping in YAML is that; every other text is itself. All other fields are YAML.

    Raises:
        RecipeError: an override is not of that form, or runs through something without fields.
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
                    "whole"
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
    """The types that each field allows, by its dotted name."""
    kinds: dict[str, set[Any]] = {}
    for attribute, info in section.model_fields.items():
        name = prefix + (info.alias or attribute)
        allowed = _plain_types(info.annotation)
        # Of one name in several kinds of model: what any of them allows.
        kinds[name] = kinds.get(name, set()) | allowed
        for kind in allowed:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                for inner, types_of_inner in _field_kinds(kind, f"{name}.").items():
                    kinds[inner] = kinds.get(inner, set()) | types_of_inner
    return kinds


def _plain_types(annotation: Any) -> set[Any]:
    """``{str, NoneType}`` for ``Annotated[str, ...] | None``; of generic types their origin."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain_types(arguments[0])
    if origin in (Union, types.UnionType):
        return set().union(*map(_plain_types, arguments))
    return {origin or annotation}
