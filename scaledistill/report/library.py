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
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cached = Path(root) / "scaledistill-report" / f"vega-{number}.js"
    with contextlib.suppress(OSError):
        return cached.read_text()
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    with contextlib.suppress(OSError):  # a machine without a home folder bundles it each time
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(cached, script.encode())
    return script
