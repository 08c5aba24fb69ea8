"""The structure that the design promises: who may import whom, and how long things may get."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "scaledistill"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Who may import a heavy third party, anywhere; nobody else does. A folder stands for its modules.
THIRD_PARTIES: dict[str, set[str]] = {
    "accelerate": {"metrics.trackers", "models.teacher"},
    "datasets": {"data.prepare.sources", "glue.read", "integrations.datasets"},
    "deepspeed": {"engines.zero"},
    "matplotlib": {"glue.picture", "metrics.recorder"},
    "vl_convert": {"report.library"},
    "torch.distributed.fsdp": {"engines.fsdp"},
    "onnxruntime": {"publishing.onnx_model"},
    "sentence_transformers": {"publishing.formats"},
    "triton": {"relations"},
    "webdataset": {"data.shards", "data.prepare.sources"},
}

# Imported before the command line has said what it wants: quick, so nothing heavy at their top.
LIGHT_AT_THE_TOP = {
    *(
        "__init__",
        *(name for name in MODULES if name.partition(".")[0] == "cli"),
        "config",
        "config.defaults",
        "config.schema",
        "config.load",
        "config.hints",
        "config.wording",
    ),
    *("errors", "data.prepare.text", "data.tokenizer", "data.prepare.make", "data.prepare.sources"),
    *("distributed.launcher", "glue.cell", "glue.command"),
    *("publishing.hub", "publishing.request"),
    *("preflight", "preflight.doctor", "metrics.benchmark"),
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that are imported anywhere under `tree`; of the package, without its
    name.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] != PACKAGE.name:
                # A package, and what is in it.
                yield from itertools.accumulate(name.split("."), "{}.{}".format)
                continue
            inner = name.partition(".")[2]
            while inner not in MODULES and inner:  # the module, not the name in it
                inner = inner.rpartition(".")[0]
            yield "scaledistill:" + (inner or "__init__")


@functools.cache
def parse(name: str) -> ast.Module:
    """Return the tree of a module; the tests share it and do not change it."""
    return ast.parse(MODULES[name].read_text(), str(MODULES[name]))


@functools.cache
def imports_of(name: str) -> frozenset[str]:
    return frozenset(imports(parse(name)))


@pytest.mark.parametrize("package", THIRD_PARTIES)
def test_imports_of_third_parties(package: str) -> None:
    found = {name for name in MODULES if package in imports_of(name)}
    allowed = THIRD_PARTIES[package]
    assert {
        name for name in found if name not in allowed and name.rpartition(".")[0] not in allowed
    } == set()
    assert all(
        any(name == row or name.startswith(row + ".") for name in found) for row in allowed
    ), "table too wide"


@pytest.mark.parametrize("name", sorted(LIGHT_AT_THE_TOP))
def test_nothing_heavy_at_the_top(name: str) -> None:
    at_the_top = [
        node for node in parse(name).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    found = {imported for node in at_the_top for imported in imports(node)}
    assert not {"torch", "transformers", "datasets", "webdataset", "rich"} & found


def test_only_the_command_line_starts_a_run() -> None:
    loop = "scaledistill:training.loop"
    assert {name for name in MODULES if loop in imports_of(name)} == {"__init__", "cli.distill"}
    lazily = [
        node for node in parse("__init__").body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not any(loop == name for node in lazily for name in imports(node))
    for script in (*PACKAGE.parent.glob("launch/*.py"), *PACKAGE.parent.glob("tools/**/*.py")):
        assert loop not in imports(ast.parse(script.read_text())), script.name


def test_few_names_lie_at_the_top() -> None:
    """What users import, and the errors; everything else has a folder in the layers of
    pyproject.toml.
    """
    top = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert top == {"__main__", "errors", "evaluation", "trainer"}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_quiet(name: str) -> None:
    text, tree = MODULES[name].read_text(), parse(name)
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"print", "breakpoint", "eval", "exec"}
    assert not re.search(r"/(?:home|root|work|tmp|Users|mnt)/", text), "a path of some machine"
    assert ast.get_docstring(tree) or not tree.body, "a module says what enters and what leaves"


@pytest.mark.parametrize(
    ("module", "function", "num_lines"),
    [("training.step", "train_step", 45), ("training.loop", "run_steps", 65)],
)
def test_what_a_run_does_fits_on_one_screen(module: str, function: str, num_lines: int) -> None:
    [found] = [
        node
        for node in parse(module).body
        if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    assert found.end_lineno is not None
    assert found.end_lineno - found.lineno + 1 <= num_lines
