"""One headless browser for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from devtools import NAMES, PACKAGE, Browser, find_browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    command = find_browser()
    if command is None:
        reason = f"no browser is installed ({', '.join(NAMES)}); apt install {PACKAGE}"
        # Set where it must not be left out, as in continuous integration.
        if os.environ.get("CALM_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    with Browser(command, tmp_path_factory.mktemp("browser")) as running:
        yield running
