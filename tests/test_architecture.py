"""The structure that the design promises: who may import whom, and how long things may get."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "scaledistill"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Which modules of the package each may import, anywhere in it; `errors` may be imported by all but
# `relations`.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"config", "models.capture", "prepare", "relations", "train", "trainer"},
    "__main__": {"cli"},
    "background": set(),
    "benchmark": set(),
    "checkpoint": {"distributed", "files", "mirror"},
    "cli": {
        *("config", "configfile", "distributed", "doctor", "exports", "files", "hints", "launcher", "plan"),
        *("resuming", "runfolder", "train", "wording"),
    },
    "config": set(),
    "configfile": {"config", "wording"},
    "data": set(),
    "data.ahead": set(),
    "data.archives": {"data.compression", "data.longtext"},
    "data.blocks": {"data.manifest"},
    "data.compression": {"data.content"},
    "data.content": set(),
    "data.docstrings": set(),
    "data.longtext": set(),
    "data.make": {"data.longtext", "data.manifest", "data.pool", "data.shards", "data.text"},
    "data.manifest": {"data.manifest_text", "data.remote"},
    "data.manifest_text": set(),
    "data.order": set(),
    "data.paths": {"data.compression"},
    "data.pool": set(),
    "data.reader": {"data.ahead", "data.blocks", "data.manifest", "data.order", "data.remote"},
    "data.remote": {"files"},
    "data.shards": {"data.blocks", "data.manifest", "files"},
    "data.sources": {"data.archives", "data.compression", "data.content", "data.longtext", "data.paths"},
    "data.stream": {"data.ahead", "data.blocks", "data.order", "data.reader"},
    "data.text": {"data.longtext", "data.tokenizer"},
    "data.tokenizer": {"files"},
    "distributed": {"launcher"},
    "doctor": {
        "checkpoint",
        "config",
        "data.order",
        "data.manifest",
        "data.remote",
        "data.stream",
        "data.text",
        "data.tokenizer",
        "distributed",
        "engines.deepspeed_block",
        "estimate",
        "evaluation",
        "microbatch",
        "mirror",
        "models.capture",
        "models.hub",
        "models.student",
        "models.teacher",
        "relations",
        "trackers",
    },
    "engines": {"config", "distributed", "engines.deepspeed", "engines.fsdp"},
    "engines.deepspeed": {"config", "distributed", "engines", "engines.deepspeed_block"},
    "engines.deepspeed_block": {"config"},
    "engines.fsdp": {"config", "distributed", "engines"},
    "errors": set(),
    "estimate": {
        "config",
        "engines.deepspeed_block",
        "models.capture",
        "models.student",
        "relations",
        "relations.spec",
    },
    "evaluation": {
        *("config", "glue.grid", "glue.metrics", "glue.plan", "glue.read", "glue.summary", "glue.tasks"),
        *("models.export", "models.teacher", "runfolder", "wording"),
    },
    "exports": {
        *("checkpoint", "config", "configfile", "doctor", "files", "metrics", "mirror"),
        *("models.export", "models.hub", "models.student", "models.teacher"),
    },
    "fetching": {"config", "data.tokenizer", "distributed", "files", "models.hub", "models.teacher"},
    "files": set(),
    "glue": set(),
    "glue.metrics": {"glue.tasks"},
    "glue.probe": {"benchmark", "data.tokenizer", "glue.plan", "glue.read", "glue.tasks", "models.teacher"},
    "glue.published": set(),
    "glue.read": {"data.compression", "glue.tasks"},
    "glue.squad": {"glue.read"},
    "glue.tasks": set(),
    "glue.cell": {"files"},
    "glue.command": {
        *("config", "glue.cell", "glue.grid", "glue.listing", "glue.plan", "glue.probe", "glue.speed", "glue.tasks"),
        *("glue.worker", "wording"),
    },
    "glue.features": {"data.text", "glue.cell", "glue.metrics", "glue.read", "glue.squad", "glue.tasks"},
    "glue.finetune": {"glue.cell", "glue.features", "glue.metrics", "glue.tasks", "models.teacher", "models.weights"},
    "glue.grid": {"config", "files", "glue.cell", "glue.plan", "glue.summary", "glue.worker"},
    "glue.listing": {"benchmark", "glue.cell", "glue.plan", "speed"},
    "glue.picture": {"glue.summary"},
    "glue.plan": {
        *("config", "data.tokenizer", "files", "glue.cell", "glue.features", "glue.metrics", "glue.read"),
        *("glue.squad", "glue.tasks", "models.capture", "models.teacher", "models.weights"),
    },
    "glue.speed": {"benchmark", "glue.plan", "models.teacher"},
    "glue.summary": {
        *("benchmark", "files", "glue.cell", "glue.metrics", "glue.picture", "glue.published", "glue.tasks"),
    },
    "glue.worker": {"__init__", "glue.cell", "glue.finetune"},
    "hints": set(),
    "launcher": set(),
    "metrics": {"background", "trackers"},
    "microbatch": {"config", "distributed", "estimate", "models.capture", "models.teacher", "relations"},
    "mirror": {"data.remote"},
    "models": set(),
    "models.attention": set(),
    "models.capture": {"models.attention", "models.configs", "relations"},
    "models.configs": set(),
    "models.export": {"data.tokenizer", "files", "models.capture", "models.teacher"},
    "models.hub": set(),
    "models.student": {"models.capture", "models.configs", "models.teacher"},
    "models.teacher": {
        *("files", "models.capture", "models.configs", "models.hub", "models.weights", "relations"),
    },
    "models.weights": set(),
    "relations": {"relations.reference", "relations.sdpa", "relations.spec", "relations.triton"},
    "relations.reference": {"relations.spec"},
    "relations.sdpa": {"relations.spec"},
    "relations.spec": set(),
    "relations.triton": {
        *("relations.reference", "relations.spec", "relations.triton_kernels", "relations.triton_launch"),
    },
    "relations.triton_kernels": set(),
    "relations.triton_launch": set(),
    "plan": {
        *("config", "distributed", "doctor", "engines.deepspeed_block", "estimate", "glue.listing", "metrics"),
    },
    "prepare": set(),
    "probing": {
        *("data.tokenizer", "distributed", "glue.plan", "glue.probe", "models.capture", "models.student", "session"),
    },
    "profiling": {"files", "session", "speed", "step"},
    "resuming": set(),
    "runfolder": {"background", "distributed", "files"},
    "saving": {"background", "checkpoint", "distributed", "files", "mirror"},
    "session": {
        "__init__",
        "checkpoint",
        "config",
        "data.order",
        "data.stream",
        "distributed",
        "doctor",
        "engines",
        "engines.deepspeed_block",
        "estimate",
        "exports",
        "fetching",
        "microbatch",
        "models.attention",
        "models.capture",
        "models.student",
        "models.teacher",
        "saving",
        "speed",
    },
    "speed": set(),
    "step": {"data.stream", "distributed", "models.capture", "relations", "session", "speed"},
    "trackers": {"files"},
    "trainer": {
        "files",
        "models.capture",
        "models.student",
        "models.teacher",
        "models.weights",
        "prepare",
        "relations",
    },
    "train": {
        *("config", "distributed", "doctor", "evaluation", "files", "metrics", "profiling", "runfolder", "session"),
        *("fetching", "mirror", "models.hub", "plan", "probing", "resuming", "saving", "speed", "step", "watchdog"),
    },
    "watchdog": {"config", "distributed", "resuming"},
    "wording": {"config", "hints"},
}

# Who may import a heavy third party, anywhere; nobody else does. A folder stands for its modules.
THIRD_PARTIES: dict[str, set[str]] = {
    "accelerate": {"trackers", "models.teacher"},
    "datasets": {"data.sources", "glue.read", "prepare"},
    "deepspeed": {"engines.deepspeed"},
    "matplotlib": {"glue.picture", "metrics"},
    "triton": {"relations"},
    "torch": {
        *("checkpoint", "cli", "data.stream", "distributed", "doctor", "engines", "engines.deepspeed"),
        *(
            "estimate",
            "evaluation",
            "exports",
            "glue.finetune",
            "glue.grid",
            "glue.listing",
            "glue.probe",
            "glue.speed",
            "microbatch",
        ),
        *(
            "models",
            "probing",
            "profiling",
            "relations",
            "saving",
            "session",
            "speed",
            "step",
            "train",
            "trainer",
            "watchdog",
        ),
    },
    "transformers": {
        *("data.make", "data.text", "data.tokenizer", "doctor", "estimate", "exports", "microbatch", "models"),
        *("prepare", "session", "step", "trainer"),
        *("glue.features", "glue.finetune", "glue.plan", "glue.probe", "glue.speed", "glue.squad"),
    },
    "webdataset": {"data.shards", "data.sources"},
}

# Imported before the command line has said what it wants: quick, so nothing heavy at their top.
LIGHT_AT_THE_TOP = {
    *("__init__", "cli", "config", "configfile", "errors", "hints", "wording"),
    *("data.text", "data.tokenizer", "data.make", "data.sources"),
    *("glue.cell", "glue.command"),
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that are imported anywhere under `tree`; of the package, without its name."""
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
                yield name.partition(".")[0]
                continue
            inner = name.partition(".")[2]
            while inner not in MODULES and inner:  # from scaledistill.files import sync: the module, not the name
                inner = inner.rpartition(".")[0]
            yield "scaledistill:" + (inner or "__init__")


def parse(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(), str(MODULES[name]))


def test_every_module_has_its_row() -> None:
    assert sorted(ALLOWED) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_of_the_package(name: str) -> None:
    found = {module.removeprefix("scaledistill:") for module in imports(parse(name)) if ":" in module}
    everywhere = set() if name.partition(".")[0] == "relations" else {"errors"}
    assert found - everywhere == ALLOWED[name], "change the code, or this table"


@pytest.mark.parametrize("package", THIRD_PARTIES)
def test_imports_of_third_parties(package: str) -> None:
    found = {name for name in MODULES if package in imports(parse(name))}
    allowed = THIRD_PARTIES[package]
    assert {name for name in found if name not in allowed and name.rpartition(".")[0] not in allowed} == set()
    assert all(any(name == row or name.startswith(row + ".") for name in found) for row in allowed), "table too wide"


@pytest.mark.parametrize("name", sorted(LIGHT_AT_THE_TOP))
def test_nothing_heavy_at_the_top(name: str) -> None:
    tree = parse(name)
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not {"torch", "transformers", "datasets", "webdataset", "rich"} & set(imports(tree))


def test_only_the_command_line_starts_a_run() -> None:
    assert {name for name, allowed in ALLOWED.items() if "train" in allowed} == {"__init__", "cli"}
    lazily = [node for node in parse("__init__").body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("train" in name for node in lazily for name in imports(node))
    for script in (*PACKAGE.parent.glob("launch/*.py"), *PACKAGE.parent.glob("tools/*.py")):
        assert "scaledistill:train" not in imports(ast.parse(script.read_text())), script.name


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_quiet(name: str) -> None:
    text = MODULES[name].read_text()
    tree = ast.parse(text)
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"print", "breakpoint", "eval", "exec"}
    assert not re.search(r"/(?:home|root|work|tmp|Users|mnt)/", text), "a path of some machine"
    assert ast.get_docstring(tree) or not tree.body, "a module says what enters and what leaves"


def test_the_train_step_fits_on_one_screen() -> None:
    [step] = [node for node in parse("step").body if isinstance(node, ast.FunctionDef) and node.name == "train_step"]
    assert step.end_lineno is not None
    assert step.end_lineno - step.lineno + 1 <= 45
