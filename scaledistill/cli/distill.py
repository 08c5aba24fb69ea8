"""`scaledistill distill`: the command line of a run.

Inputs: command-line arguments and launcher environment variables. Outputs: messages and an exit
code. Not handled here: the configuration (`config`) and the run itself (`training.loop`).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from scaledistill.cli.parsing import positive, spin_briefly, step_or_newest
from scaledistill.distributed.launcher import (
    ISOLATED,
    check_numbers,
    is_launched,
    launcher_facts,
    stated_rank,
)
from scaledistill.errors import (
    EXIT_DONE,
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    ConfigError,
    DataError,
    DivergedError,
    PeerError,
    named,
    stopped_like_ctrl_c,
)

if TYPE_CHECKING:
    from scaledistill.config.schema import DistillConfig

RANK = f"{ISOLATED}from scaledistill.cli.command import main; sys.exit(main())"
PROG = "scaledistill distill"
MODES = ("print_config", "explain", "validate", "dry_run", "profile", "export")
"""Options that ask for something else than a run that can be resumed."""
REPORT_SECONDS = 30.0
"""How long a failing rank waits before it exits, so that the reporting rank on its machine can
print the error first."""
FAR_REPORT_SECONDS = 5.0
"""The same wait on a machine without the reporting rank; that rank's launcher does not see this one
exit."""
DESCRIPTION = """Distil students from a frozen teacher; rerun the same command to resume.

It starts a rank for each GPU of this machine, or as many as --num-ranks states. `deepspeed`,
`torchrun` and `accelerate launch` may start the ranks instead."""
EPILOG = """exit codes: 0 done, 1 an unexpected error, 2 configuration, 3 environment or data,
4 diverged, 75 stopped on request (0 under torchrun, which would restart the run; rerun the command
to resume), 130 interrupted. <run.folder>/status.json states how a run ended, even if a launcher
changes the exit code.

examples:
  %(prog)s --config my.yaml --validate
  %(prog)s --config my.yaml --set train.max_steps=1000 --set run.folder=runs/short"""


class _MainRankParser(argparse.ArgumentParser):
    """A parser that prints on rank 0 only and suggests the nearest option for a misspelt one."""

    def parse_args(self, arguments: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            from scaledistill.config.hints import argument_hint
            from scaledistill.config.wording import setting_names

            known = [name for action in self._actions for name in action.option_strings]
            self.error(argument_hint(unknown, known, setting_names()))
        if options.config is None and options.explain is None:
            self.error("--config FILE is missing; `scaledistill init` writes one to start from")
        return options

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            self._print_message(message, sys.stderr)
        sys.exit(_after_report(status, "RANK") if status else 0)

    def _print_message(self, message: str, file: Any = None) -> None:
        if stated_rank() == "0":
            super()._print_message(message, file)


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parse = _MainRankParser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("--config", metavar="FILE", help="the run's settings, a YAML or JSON file")
    parse.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a setting, such as train.max_steps=100; repeatable",
    )  # fmt: skip
    parse.add_argument(
        "--num-ranks",
        type=positive,
        metavar="N",
        help="start N ranks on this machine (default: one per GPU; one without GPUs)",
    )
    parse.add_argument(
        "--print-config",
        nargs="?",
        const="json",
        choices=("json", "yaml"),
        help="print the full configuration and exit; yaml says what each setting does",
    )
    parse.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="print what a setting or block does, its default and whether a resume may change it",
    )
    parse.add_argument(
        "--validate",
        action="store_true",
        default=None,
        help="check everything without loading weights and print the plan",
    )
    parse.add_argument(
        "--world-size",
        type=positive,
        metavar="N",
        help="with --validate: plan for N ranks, on any machines (default: those of this one)",
    )
    parse.add_argument(
        "--tokens-per-second",
        type=_above_zero,
        metavar="X",
        help="with --validate: throughput of one rank; adds the run's hours to the plan",
    )
    parse.add_argument(
        "--device-memory-gb",
        type=_above_zero,
        metavar="X",
        help="with --validate: plan for GPUs with X GB of memory",
    )
    parse.add_argument(
        "--dry-run", type=positive, metavar="N", help="make N real steps and write nothing"
    )
    parse.add_argument(
        "--profile",
        type=positive,
        metavar="N",
        help="profile N real steps: <run.folder>/profile/ has a table and a trace",
    )
    parse.add_argument(
        "--export",
        type=step_or_newest,
        metavar="STEP",
        help="export the student of a checkpoint as a model, without training; STEP is the step "
        "of a checkpoint, or 'newest'",
    )
    parse.add_argument(
        "--fresh",
        action="store_true",
        help="start over; the old run folder is renamed, not deleted",
    )
    parse.add_argument(
        "--debug", action="store_true", help="show tracebacks and third-party messages"
    )
    parse.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # set by the deepspeed launcher
    return parse


def _check_together(parse: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse combinations in which an option would be ignored."""
    given = [f"--{mode.replace('_', '-')}" for mode in MODES if getattr(options, mode) is not None]
    if len(given) > 1:
        parse.error(f"{' and '.join(given)} do different things; give one of them")
    if options.fresh and given and given[0] in ("--print-config", "--explain", "--export"):
        parse.error(f"--fresh starts a run over, {given[0]} starts none; give one of them")
    if options.num_ranks and given and given[0] in ("--print-config", "--explain", "--export"):
        parse.error(f"--num-ranks starts a run, {given[0]} starts none; give one of them")


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
    return number


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line and return the exit code.

    Collective: every rank of a run calls it with the same arguments.
    """
    parse = parser(prog)
    options = parse.parse_args(arguments)
    if options.world_size and not options.validate:
        parse.error(
            "--world-size is read only with --validate; the launcher sets the ranks of a run"
        )
    for option in ("tokens_per_second", "device_memory_gb"):
        if getattr(options, option) and not options.validate:
            parse.error(f"--{option.replace('_', '-')} is read only with --validate")
    _check_together(parse, options)
    is_main = stated_rank() == "0"
    _set_up_messages(is_main, options.debug)
    spin_briefly()
    log = logging.getLogger("scaledistill")
    try:
        check_numbers()
    except ConfigError as error:
        log.error("%s", error)
        return error.exit_code
    from scaledistill.config.load import check_paths, load_config

    try:
        if options.explain is not None:
            return _explain(options.explain, is_main)
        config = load_config(options.config, options.overrides)
        if not options.print_config:
            check_paths(config, options.config, warns=is_main)
    except ConfigError as error:
        # One message per machine, since each machine reads its own copy of the file.
        if stated_rank("LOCAL_RANK") == "0":
            log.error("%s", error)
        return _after_report(error.exit_code, "LOCAL_RANK")
    except KeyboardInterrupt:
        if is_main:
            log.error("interrupted")
        return EXIT_INTERRUPTED
    try:
        if options.print_config:
            if is_main:
                sys.stdout.write(_printed(config, options.print_config))
            return EXIT_DONE
        if options.export is not None or options.validate:
            with stopped_like_ctrl_c():
                if options.validate:
                    return _validate(config, options, is_main)
                return _export(config, options.export, is_main)
        if num_ranks := _ranks_to_start(options.num_ranks):
            given = sys.argv[1:] if arguments is None else arguments
            return _start_ranks(config, options, num_ranks, given)
        from scaledistill.training.loop import distill

        under_elastic = "TORCHELASTIC_RUN_ID" in os.environ
        # The first start has already applied --fresh; a restart must keep the new run folder.
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        result = distill(
            config,
            fresh=options.fresh and not restarted,
            dry_run_steps=options.dry_run,
            profile_steps=options.profile,
        )
        log.info("%s", result.message)
        if result.exit_code == EXIT_STOPPED and under_elastic:
            # torchrun would restart a stopped run on any other code; status.json has the state.
            return EXIT_DONE
        return result.exit_code
    except (ConfigError, DataError, DivergedError) as error:
        if options.debug:
            raise
        log.error("%s", error)
        return error.exit_code
    except PeerError as error:
        return _after_report(error.exit_code, "RANK")
    except RuntimeError as error:
        from scaledistill.distributed.failures import explain

        if options.debug or (message := explain(error)) is None:
            raise
        log.error("%s", message)
        return EXIT_ENVIRONMENT
    except KeyboardInterrupt:
        from scaledistill.run.resume_hint import resume_hint

        is_run = all(getattr(options, mode) is None for mode in MODES)
        if is_main:
            log.error("interrupted%s", f"; {resume_hint(config.run.folder)}" if is_run else "")
        return EXIT_INTERRUPTED


def _ranks_to_start(stated: int | None) -> int:
    """Return how many ranks this process starts; 0 if it is a rank itself.

    Raises:
        ConfigError: the number differs from that of the launcher, there are fewer GPUs, or several
            processes were started that do not know of each other.
    """
    if is_launched():
        if stated and stated != (started := launcher_facts().world_size):
            raise ConfigError(
                f"--num-ranks {stated}: a launcher has started {started}; leave the option out, or "
                "start the command without a launcher"
            )
        return 0
    from scaledistill.distributed.start import ranks_to_start

    with named(num_ranks="--num-ranks"):
        number = ranks_to_start(stated)
    if number == 1:
        return 0
    launcher_facts()  # refuses several tasks of srun or MPI, each of which would start ranks
    return number


def _start_ranks(
    config: DistillConfig, options: argparse.Namespace, num_ranks: int, arguments: Sequence[str]
) -> int:
    """Start the command as several ranks, wait for them and return the exit code."""
    from scaledistill.config.presets import CLONE
    from scaledistill.distributed.start import start_ranks
    from scaledistill.storage.files import read_json

    if CLONE:
        paths = [str(CLONE), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = ["-c", RANK, "distill", *arguments]
    code = start_ranks(command, num_ranks, quiet=not options.debug)
    if code == EXIT_DONE and not (options.dry_run or options.profile):
        # Under torchrun, ranks that were stopped exit with 0; see `main`.
        status = read_json(Path(config.run.folder) / "status.json") or {}
        code = EXIT_STOPPED if status.get("state") == "stopped" else EXIT_DONE
    return code


def _explain(key: str, is_main: bool) -> int:
    from scaledistill.config.manual import explain_setting

    text = explain_setting(key)
    if is_main:
        sys.stdout.write(text)
    return EXIT_DONE


def _printed(config: DistillConfig, form: Literal["json", "yaml"]) -> str:
    if form == "json":
        return config.to_json()
    from scaledistill.config.manual import commented_yaml

    return commented_yaml(config.model_dump())


def _export(config: DistillConfig, step: int | str, is_main: bool) -> int:
    if is_main:
        from scaledistill.training.exports import export_checkpoint

        for folder in export_checkpoint(config, step):
            logging.getLogger("scaledistill").info("the student is in %s", folder)
    return EXIT_DONE


def _after_report(code: int, name: Literal["RANK", "LOCAL_RANK"]) -> int:
    """Return an exit code once the rank whose `name` is 0 has had time to report the error.

    Launchers end all ranks of their machine as soon as one fails. The ranks that print nothing
    therefore wait; the launcher ends them as soon as the reporting rank has exited.
    """
    numbers = (stated_rank(name), stated_rank(), stated_rank("LOCAL_RANK"))
    number, rank, local_rank = (int(text) if text.isdecimal() else 0 for text in numbers)
    if number:
        time.sleep(
            REPORT_SECONDS if name == "LOCAL_RANK" or rank == local_rank else FAR_REPORT_SECONDS
        )
    return code


def _validate(config: DistillConfig, options: argparse.Namespace, is_main: bool) -> int:
    if not is_main:
        return EXIT_DONE
    import torch
    from rich.console import Console

    from scaledistill.preflight.checks import plan_run
    from scaledistill.preflight.report import placement_table, plan_table, warnings_of
    from scaledistill.run.folder import described
    from scaledistill.storage.files import in_use

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = (
        options.world_size
        or options.num_ranks
        or int(os.environ.get("WORLD_SIZE", max(1, torch.cuda.device_count())))
    )
    stated = options.device_memory_gb and int(options.device_memory_gb * 1e9)
    plan = plan_run(config, ranks, device, fresh=options.fresh, gpu_bytes=stated)
    here = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    console = Console()
    console.print(plan_table(plan, options.tokens_per_second))
    console.print()
    console.print(placement_table(plan, stated or here))
    console.print()
    for warning in warnings_of(plan):
        console.print(f"warning: {warning}", highlight=False, markup=False)
    if in_use(Path(config.run.folder)):
        raise ConfigError(
            f"run.folder={config.run.folder!r} is in use by a running process "
            f"({described(Path(config.run.folder))}); wait until it has ended, or set another "
            "run.folder. All other checks passed"
        )
    console.print("all checks passed (weights not loaded)")
    return EXIT_DONE


def _set_up_messages(is_main: bool, debug: bool) -> None:
    """Show our messages, only warnings on ranks other than 0, and silence third parties."""
    package = logging.getLogger("scaledistill")
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(
            console=Console(stderr=True), show_path=False, markup=False
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        where = "" if is_main else f"[rank {stated_rank()}] "
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s {where}%(levelname)s %(message)s", "%H:%M:%S")
        )
    package.handlers[:] = [handler]
    package.propagate = False
    package.setLevel(logging.DEBUG if debug else logging.INFO if is_main else logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:
        warnings.filterwarnings("ignore")
        # matplotlib warns if there is no home folder for its font cache.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
        os.environ.setdefault("DS_LOG_LEVEL", "error")


if __name__ == "__main__":
    sys.exit(main())
