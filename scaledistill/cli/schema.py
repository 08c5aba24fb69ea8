"""`scaledistill schema`: print the JSON schema of a configuration.

Inputs: command-line arguments. Outputs: the schema. Not handled here: making it (`config.manual`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from scaledistill.cli.parsing import Parser
from scaledistill.errors import EXIT_DONE

PROG = "scaledistill schema"
DESCRIPTION = """Print the JSON schema of a configuration, with the descriptions of all settings.

Editors complete and check a configuration that names the file: "$schema": "config.schema.json" in
JSON, or the comment "# yaml-language-server: $schema=config.schema.json" in YAML."""
EPILOG = """examples:
  %(prog)s > config.schema.json
  %(prog)s | python -m json.tool --indent 1"""


def parser(prog: str = PROG) -> Parser:
    """Return the parser of the command line."""
    return Parser(prog, DESCRIPTION, EPILOG)


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Print the schema and return the exit code."""
    parser(prog).parse_args(arguments)
    from scaledistill.config.manual import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n")
    return EXIT_DONE
