"""Secrets are masked in what is written; everything else stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calm_dist.recipe import load_recipe
from calm_dist.redact import MASK, is_secret_name, redact, redact_arguments, redact_values

ROOT = Path(__file__).parents[2]

AWS_ID = "AKIA" + "IOSFODNN7EXAMPLE"
AWS_SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
HEX = "0123456789abcdef0123456789abcdef01234567"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcDEF_123"

SECRET_ARGUMENTS = [
    # (arguments, what must be gone, what they become)
    (["key=s3cr3t"], ["key=***"]),
    (["--token", "s3cr3t"], ["--token", "***"]),
    (["--header", "Authorization: token s3cr3t"], ["--header", "Authorization: token ***"]),
    (["--header=X-Api-Key: s3cr3t"], ["--header=X-Api-Key: ***"]),
    (["--password:s3cr3t"], ["--password:***"]),
    (["redis://h/?auth=s3cr3t"], ["redis://h/?auth=***"]),
    (["--token=s3cr3t"], ["--token=***"]),
    (["--hf-token", "s3cr3t", "--other"], ["--hf-token", "***", "--other"]),
    (["-token", "s3cr3t"], ["-token", "***"]),
    (["--api_key", "s3cr3t"], ["--api_key", "***"]),
    (["api-key=s3cr3t"], ["api-key=***"]),
    (["logging.wandb_api_key=s3cr3t"], ["logging.wandb_api_key=***"]),
    (["WANDB_API_KEY=s3cr3t"], ["WANDB_API_KEY=***"]),
    (["apiKey=s3cr3t"], ["apiKey=***"]),
    (["AWS_SECRET_ACCESS_KEY=s3cr3t"], ["AWS_SECRET_ACCESS_KEY=***"]),
    (["AWS_ACCESS_KEY_ID=s3cr3t"], ["AWS_ACCESS_KEY_ID=***"]),
    (["AWSAccessKeyId=s3cr3t"], ["AWSAccessKeyId=***"]),
    (["AWS_SESSION_TOKEN=s3cr3t"], ["AWS_SESSION_TOKEN=***"]),
    (["db.password=two words s3cr3t"], ["db.password=***"]),
    (["password='s3cr3t'"], ["password=***"]),
    (["secret_name=s3cr3t"], ["secret_name=***"]),
    (
        ["data.path=sftp://me:s3cr3t@host:22/store"],
        ["data.path=sftp://me:***@host:22/store"],
    ),
    (["data.path=https://:s3cr3t@host/store"], ["data.path=https://:***@host/store"]),
    (["data.path=https://me:s3c@r3t@host/x"], ["data.path=https://me:***@host/x"]),
    (["https://" + "a1" * 12 + "@host/x.git"], ["https://***@host/x.git"]),
    (
        ["data.path=https://host/x?X-Amz-Credential=s3cr3t%2Fus&X-Amz-Date=1&X-Amz-Signature=s3cr"],
        ["data.path=https://host/x?X-Amz-Credential=***&X-Amz-Date=1&X-Amz-Signature=***"],
    ),
    (
        ["https://host/x?X-Amz-Security-Token=s3cr3t&part=1"],
        ["https://host/x?X-Amz-Security-Token=***&part=1"],
    ),
    (["https://a.blob/x?sv=2024&sig=s3cr3t%3D"], ["https://a.blob/x?sv=2024&sig=***"]),
    (["https://host/x?X-Goog-Signature=s3cr3t"], ["https://host/x?X-Goog-Signature=***"]),
    (["https://host/x?access_token=s3cr3t#top"], ["https://host/x?access_token=***"]),
    ([f"run.name={AWS_ID}"], ["run.name=***"]),
    ([f"s3://bucket/{AWS_ID}/x"], ["s3://bucket/***/x"]),
    ([AWS_SECRET], ["***"]),
    ([f"run.name={AWS_SECRET}"], ["run.name=***"]),
    ([f"run.name={HEX}"], ["run.name=***"]),
    ([HEX], ["***"]),
    (["x", "hf_" + "aB3" * 10], ["x", "***"]),
    (["ghp_" + "aB3" * 12], ["***"]),
    (["github_pat_" + "aB3" * 12], ["***"]),
    (["glpat-" + "aB3" * 7], ["***"]),
    (["sk-proj-" + "aB3" * 9], ["***"]),
    (["wandb_v1_" + "aB3" * 9], ["***"]),
    ([JWT], ["***"]),
    (["--header", "Authorization: Bearer s3cr3t-0123"], ["--header", "Authorization: Bearer ***"]),
    (["-----BEGIN RSA PRIVATE KEY-----\ns3cr3t\n-----END RSA PRIVATE KEY-----"], ["***"]),
    (['{"api_key": "s3cr3t", "n": 1}'], ['{"api_key": "***", "n": 1}']),
]

ORDINARY_ARGUMENTS = [
    "tools/train.py",
    "/home/me/calm_dist/recipes/calm_tiny.yaml",
    "data.tokenizer=data/tokenizer.model",
    "data.tokenizer=tokenizer.json",
    "--tokenizer",
    "training.key_size=64",
    "model.num_key_value_heads=4",
    "training.tokens=1000000",
    "model.token_dropout=0.15",
    "model.replaced_token_id=3",
    "max_tokens=5",
    "tokens_per_step=2048",
    "sort_key=loss",
    "text-key=body",
    "public_key=abc",
    "--keys",
    "run.name=key_study",
    "run.dir=runs/secretary",
    "data.path=s3://bucket/stores/train",
    "data.path=oci://bucket@namespace/store",
    "data.path=sftp://me@host/store",
    "data.path=hf://datasets/org/name/store",
    "data.path=/cache/snapshots/" + HEX + "/store",
    f"revision={HEX}",
    f"autoencoder.sha256={'0123456789abcdef' * 4}",
    'data.path=[{"path": "one", "weight": 1.0}]',
    "https://host/x?list-type=2&prefix=a/b",
    "http://127.0.0.1:8080/x",
    "http://[::1]:80/x",
    "checkpoint.keep_every=100",
    "",
    "-",
    "--",
    "=",
]


@pytest.mark.parametrize(("given", "expected"), SECRET_ARGUMENTS, ids=lambda value: value[0][:40])
def test_secrets_are_masked(given: list[str], expected: list[str]) -> None:
    assert redact_arguments(given) == expected
    assert "s3c" not in " ".join(redact_arguments(given))
    # Once more changes nothing.
    assert redact_arguments(expected) == expected


@pytest.mark.parametrize("argument", ORDINARY_ARGUMENTS)
def test_ordinary_arguments_stay(argument: str) -> None:
    assert redact_arguments([argument]) == [argument]
    assert redact_arguments(["train.py", argument, "data.seed=1"])[1] == argument
    assert redact(argument) == argument


def test_no_field_of_a_recipe_has_the_name_of_a_secret() -> None:
    """Otherwise its value would be missing from what is written about a run."""
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        values = load_recipe(file).to_dict()
        assert redact_values(values) == json.loads(json.dumps(values)), file
        for section, fields in values.items():
            names = fields if isinstance(fields, dict) else [section]
            assert not [name for name in names if is_secret_name(name)]


def test_values_are_masked_by_name_and_by_shape() -> None:
    values = {
        "token": "s3cr3t",
        "tokenizer": "t.json",
        "path": [{"path": "sftp://me:s3cr3t@host/x", "weight": 1.0}],
        "nested": {"db_password": "s3cr3t", "n": 3, "none": None},
    }
    assert redact_values(values) == {
        "token": MASK,
        "tokenizer": "t.json",
        "path": [{"path": "sftp://me:***@host/x", "weight": 1.0}],
        "nested": {"db_password": MASK, "n": 3, "none": None},
    }


def test_texts_of_several_lines() -> None:
    text = "cannot read sftp://me:s3cr3t@host/x (timeout)\nretry: token=s3cr3t&n=1, ok"
    assert redact(text) == "cannot read sftp://me:***@host/x (timeout)\nretry: token=***&n=1, ok"
