"""Recipes as text: reads and writes strict YAML."""

from __future__ import annotations

import re
from typing import Any

import yaml

from calm_dist.errors import RecipeError, shown


class _Loader(yaml.SafeLoader):
    """YAML as people write it in recipes.

    PyYAML follows YAML 1.1, in which ``3e-4`` is a string, ``off`` is a boolean, ``010`` is eight,
    ``1:30`` is ninety and the later of two equal keys wins silently. Here, ``3e-4`` is a float,
    ``off`` a string, ``010`` and ``1:30`` are not integers, and a repeated key is an error. So are
    aliases: a few lines of them expand to gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"alias *{event.anchor}: write the value itself", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a name", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {shown(key_node.value)} appears twice", key_node.start_mark
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


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or `_Loader` would not read back as the same text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # In other styles, PyYAML reads some characters (U+0085) back as line breaks.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
# A separate table, extended by the loader's patterns.
_Dumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *_Loader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def write_yaml(values: Any) -> str:
    """Plain values as YAML text, which `parse_yaml` reads back equal."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf")
    )


def parse_yaml(text: str, *, source: str) -> Any:
    """Parse YAML text; ``source`` names it in errors.

    Raises:
        RecipeError: it is not valid YAML, a key appears twice, or it has aliases.
    """
    try:
        # The loader derives from SafeLoader: it builds plain values only.
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or "cannot be parsed")
        raise RecipeError(f"{source}{place}: {problem[:300]}; correct the YAML") from error
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        # An explicit tag such as `!!int abc`, or thousands of brackets.
        reason = f"{type(error).__name__}: {error}"[:300]
        raise RecipeError(f"{source}: cannot be parsed ({reason}); correct the YAML") from error
