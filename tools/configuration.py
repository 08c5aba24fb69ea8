"""Print docs/configuration.md, made from the fields of `scaledistill.config.schema`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from scaledistill.config.manual import NAME, NUMBER, Setting, find_setting
from scaledistill.config.wording import entries_of, expected, setting_at

PAGE = """\
# Configuration reference

<!-- Made by `python tools/configuration.py > docs/configuration.md`; change the docstrings in
scaledistill/config/schema.py instead. -->

All settings of a run, as `scaledistill distill --explain KEY` prints them. [Settings](settings.md)
explains those that need a choice. A setting without a default must be set. *Resume* says whether a
run may be resumed with another value; without it, a resume with another value is refused.
"""


def page() -> str:
    """Return the text of the page."""
    return PAGE + "".join(_block(find_setting(""), level=1))


def _block(block: Setting, level: int) -> Iterator[str]:
    """Yield the settings of a block, then its inner blocks, each under a heading."""
    assert block.block is not None
    prefix = f"{block.key}." if block.key else ""
    if block.key == "students":
        prefix += f"{NAME}."
    inner = [find_setting(prefix + name) for name in block.block.model_fields]
    for each in inner:
        if each.block is None:
            yield "".join(_setting(each))
    for each in inner:
        if each.field is not None and each.block is None and entries_of(each.field.annotation):
            each = find_setting(f"{each.key}.{NUMBER}")
        if each.block is not None:
            yield f"\n{'#' * min(level + 1, 3)} `{each.key}`\n\n{each.description}\n"
            yield from _block(each, level + 1)


def _setting(setting: Setting) -> Iterator[str]:
    assert setting.field is not None
    yield f"\n**`{setting.key}`**"
    if not setting.field.is_required():
        default = setting.field.get_default(call_default_factory=True)
        yield f" = `{json.dumps(default)}`" if default is not None else " (not set)"
    _, annotation, _ = setting_at(setting.location)
    yield f": {expected(annotation)}\n<br>{setting.description}"
    if setting.resume:
        yield f" *Resume: {setting.resume}.*"
    yield "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
