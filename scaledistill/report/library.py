"""The charting library that a page carries: Vega, Vega-Lite and Vega-Embed in one script.

Inputs: the optional package vl-convert-python, which contains them. Outputs: JavaScript. Not
handled here: what is drawn (`report.charts`).
"""

from __future__ import annotations

import contextlib
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from scaledistill.errors import DataError
from scaledistill.storage.files import write_bytes

PACKAGE = "vl-convert-python"


class MissingLibraryError(DataError):
    """The package that contains the charting library is not installed."""


def vega_script() -> str:
    """Return the script, which defines `vegaEmbed`; bundled once for each version, in seconds.

    Raises:
        MissingLibraryError: the package is not installed.
    """
    try:
        number = version(PACKAGE)
    except PackageNotFoundError:
        raise MissingLibraryError(
            f"the report needs {PACKAGE}, which is not installed: pip install "
            "'scaledistill[report]'"
        ) from None
    # Without a home folder (RuntimeError) it is bundled each time.
    with contextlib.suppress(OSError, RuntimeError):
        return _cached(number).read_text()
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    with contextlib.suppress(OSError, RuntimeError):
        cached = _cached(number)
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(cached, script.encode())
    return script


def _cached(number: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "scaledistill-report" / f"vega-{number}.js"
