"""Reading recipe text: strict YAML, and ``a.b=value`` overrides on top of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import yaml

from calm_dist.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """YAML as people write it in recipes.

    PyYAML follows YAML 1.1, in which ``3e-4`` is a string, ``off`` is a boolean, ``010`` is eight,
    ``1:30`` is ninety and the later of two equal keys wins silently. Here they are a float, a
    string, no whole numbers and an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a name", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} appears twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_REPLACED = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, *, source: str) -> Any:
    """Parse YAML text; ``source`` names it in errors.

    Raises:
        RecipeError: it is not YAML, or a key appears twice.
    """
    try:
        # The loader derives from SafeLoader: it builds plain values only.
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise RecipeError(f"{source}{place}: {problem}; correct the YAML") from error
    except (ValueError, KeyError, RecursionError) as error:
        # An explicit tag such as `!!int abc`, or thousands of brackets.
        raise RecipeError(f"{source}: cannot be parsed ({error}); correct the YAML") from error


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``values`` with each ``a.b=value`` set; later overrides win.

    Raises:
        RecipeError: an override is not of that form, or runs through something without fields.
    """
    values = copy.deepcopy(values)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        names = dotted.split(".")
        if not equals or not all(names):
            raise RecipeError(
                f"override {override!r}: not of the form section.field=value, for example "
                "training.steps=20"
            )
        section = values
        for name in names[:-1]:
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
            if not isinstance(section, dict):
                raise RecipeError(
                    f"override {override!r}: {name} has no fields of its own; override it whole"
                )
        section[names[-1]] = parse_yaml(text, source=f"override {override!r}")
    return values
