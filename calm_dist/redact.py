"""Mask secrets in text for files and logs: passwords, tokens, keys, signed URLs.

Values that a program reads are not changed; only its own output passes through here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"

# A name whose last word is one of these names a secret: ``hub.token``, ``db-password``.
_SECRET_WORDS = {
    *("password", "passwd", "passphrase", "passcode", "pwd", "pass", "pw"),
    *("auth", "secret", "secrets", "token", "credential", "credentials", "signature", "sig"),
    *("apikey", "accesskey", "secretkey", "accountkey", "authorization", "bearer", "pat"),
}
# So does a name that contains one of these, whatever follows: ``secret_name``, ``password2``.
_SECRET_PARTS = ("password", "passwd", "secret")
# So does a name that ends in "key", unless one of these precedes it: ``sort_key``, ``text-key``.
_PLAIN_KEYS = {
    *("public", "sort", "primary", "foreign", "partition", "group", "cache", "json", "jsonl"),
    *("text", "column", "field", "dict", "record", "metric", "data", "input", "output", "index"),
}
# A name that ends in "token" does not if it means a vocabulary entry: ``begin_token``.
_VOCABULARY = {"begin", "end", "bos", "eos", "pad", "unk", "unknown", "mask", "special", "stop"}
_NOT_HASHES = {"revision", "rev", "commit", "sha", "sha1", "hash", "version", "id"}

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
_URL_PASSWORD = re.compile(rf"({_SCHEME}[^\s/:@?#'\"]*):([^\s/?#'\"]+)@")
_URL_TOKEN = re.compile(rf"({_SCHEME})(?=[^\s/:@]*[0-9])[A-Za-z0-9_.~%-]{{20,}}@")
# ``name=value`` in arguments, URL queries and texts; ``"name": "value"`` in JSON.
_ASSIGNMENT = re.compile(
    r"(?P<name>[A-Za-z_][A-Za-z0-9_.-]*)(?P<equals>=|['\"]\s*:\s*(?=['\"]))"
    r"(?P<value>\"[^\"]*\"|'[^']*'|[^\s&'\"]+)"
)
# Prefixes that several services give their keys, so that leaks can be found.
_KNOWN_KEYS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|hf_[A-Za-z0-9]{20,}"
    r"|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|sk-[A-Za-z0-9_-]{20,}|xox[abeprs]-[A-Za-z0-9-]{10,}"
    r"|wandb_v[0-9]+_[A-Za-z0-9_-]{16,}|local-[0-9a-f]{40}"
    r"|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?"
    r")(?![A-Za-z0-9])"
)
# ``X-Api-Key: value`` as a whole argument, also behind ``--header=``.
_HEADER = re.compile(
    r"(?P<kept>(?:--?[\w-]+=)?-{0,2}(?P<name>[A-Za-z][\w.-]*):\s*(?:(?:Bearer|Basic|Token)\s+)?)"
    r"(?!//)\S.*",
    re.DOTALL | re.IGNORECASE,
)
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|\Z)", re.DOTALL)
# Keys without a prefix, recognized only as a whole value: those of wandb, and AWS secret keys.
_WANDB_KEY = re.compile(r"[0-9a-f]{40}")
_AWS_SECRET = re.compile(
    r"(?=(?:.*[A-Z]){5})(?=(?:.*[a-z]){5})(?=.*[0-9])[A-Za-z0-9+][A-Za-z0-9/+]{39}"
)


def is_secret_name(name: str) -> bool:
    """Whether a value of this name (``a.b_c``, ``--a-b`` or ``aB``) is a secret."""
    last = name.rstrip(".").rpartition(".")[2]
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", last)
    words = [word.lower() for word in re.split(r"[\s_-]+", spaced) if word]
    if not words:
        return False
    if words[-1] == "token" and len(words) > 1 and words[-2] in _VOCABULARY:
        return False
    if any(part in "".join(words) for part in _SECRET_PARTS) or words[-1] in _SECRET_WORDS:
        return True
    if words[-1] == "key":
        return len(words) == 1 or words[-2] not in _PLAIN_KEYS
    return words[-3:] == ["access", "key", "id"] or words == ["x", "amz", "credential"]


def redact(text: str) -> str:
    """The text with every secret masked: passwords in URLs, signed queries, ``name=value`` with a
    secret's name, and keys of a known shape."""
    text = _PEM.sub(MASK, text)
    text = _URL_PASSWORD.sub(rf"\1:{MASK}@", text)
    text = _URL_TOKEN.sub(rf"\1{MASK}@", text)
    text = _ASSIGNMENT.sub(_mask_assignment, text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    return _KNOWN_KEYS.sub(MASK, text)


def _mask_assignment(match: re.Match[str]) -> str:
    name, equals, value = match["name"], match["equals"], match["value"]
    if is_secret_name(name):
        quote = value[0] if value[0] in "'\"" else ""
        return f"{name}{equals}{quote}{MASK}{quote}"
    if not _is_hash(name) and _is_bare_key(value):
        return f"{name}{equals}{MASK}"
    # The value may itself be an assignment, such as the query of a URL.
    return f"{name}{equals}{_ASSIGNMENT.sub(_mask_assignment, value)}"


def _is_hash(name: str) -> bool:
    return re.split(r"[._-]", name.lower())[-1] in _NOT_HASHES


def _is_bare_key(value: str) -> bool:
    return bool(_WANDB_KEY.fullmatch(value) or _AWS_SECRET.fullmatch(value))


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line with every secret masked, including a value that follows its option:
    ``--token X``."""
    masked, option = [], ""
    for argument in arguments:
        is_option = argument.startswith("-") and len(argument) > 1
        if (header := _HEADER.fullmatch(argument)) and is_secret_name(header["name"]):
            masked.append(f"{header['kept']}{MASK}")
            option = ""
            continue
        follows_name = is_secret_name(option.lstrip("-")) and not is_option
        if follows_name or (_is_bare_key(argument) and not _is_hash(option)):
            masked.append(MASK)
        else:
            masked.append(_redact_option(argument) if "=" in argument else redact(argument))
        option = argument if is_option and "=" not in argument else ""
    return masked


def _redact_option(argument: str) -> str:
    """Redact ``name=value``, in which the value may have spaces and quotes."""
    name, _, value = argument.partition("=")
    if re.fullmatch(r"-{0,2}[A-Za-z_][\w.-]*", name) and is_secret_name(name.lstrip("-")) and value:
        return f"{name}={MASK}"
    return redact(argument)


def redact_values(value: Any, name: str = "") -> Any:
    """Plain values with every secret masked, recognized by its name or its shape."""
    if isinstance(value, str):
        return MASK if value and is_secret_name(name) else redact(value)
    if isinstance(value, Mapping):
        return {key: redact_values(part, str(key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(part, name) for part in value]
    return value
