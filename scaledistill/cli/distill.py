"""The command line of a run: parse, check, call `train.distill`, and turn how it ended into an exit
code.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from scaledistill.config.hints import argument_hint
from scaledistill.config.load import check_paths, load_config
from scaledistill.config.schema import DistillConfig
from scaledistill.config.wording import setting_names
from scaledistill.distributed.launcher import check_numbers
from scaledistill.errors import (
    EXIT_DONE,
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    ConfigError,
    DataError,
    DivergedError,
    PeerError,
)

REPORT_SECONDS = 30.0
"""How long a rank that fails along with others on its machine leaves them to report before it ends
the job."""
FAR_REPORT_SECONDS = 5.0
"""The same on a machine without the rank that reports, whose launcher does not see this one
leave."""
EPILOG = """exit codes: 0 done, 2 configuration, 3 environment or data, 4 diverged, 75 stopped on request (under
torchrun 0, or it would start the run again; rerun it to resume), 130 interrupted. <run.folder>/status.json tells
how a run ended, also where a launcher changes the code."""


class _OneVoice(argparse.ArgumentParser):
    """Prints on rank 0 alone, as every rank parses the same arguments; names the option that a
    misspelt one is near.
    """

    def parse_args(self, arguments: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            self.error(argument_hint(unknown, known, setting_names()))
        if options.config is None:
            self.error("--config FILE is missing; configs/ holds some to start from")
        return options

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            self._print_message(message, sys.stderr)
        sys.exit(_after_report(status, "RANK") if status else 0)

    def _print_message(self, message: str, file: Any = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super()._print_message(message, file)


def parser() -> argparse.ArgumentParser:
    """Return the parser of `launch/distill.py`."""
    parse = _OneVoice(
        prog="distill",
        description="Distil a student from a frozen teacher. Start it with `deepspeed`, `torchrun`, `accelerate "
        "launch` or plain `python`; the same command resumes.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parse.add_argument("--config", metavar="FILE", help="the run's settings, a JSON file")
    parse.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a setting, such as train.max_steps=100; repeatable",
    )  # fmt: skip
    parse.add_argument(
        "--print-config",
        action="store_true",
        default=None,
        help="print the whole configuration and leave",
    )
    parse.add_argument(
        "--validate",
        action="store_true",
        default=None,
        help="check everything without loading weights, print the plan",
    )
    parse.add_argument(
        "--world-size",
        type=_positive,
        metavar="N",
        help="with --validate: plan for N ranks (default: those here)",
    )
    parse.add_argument(
        "--tokens-per-second",
        type=_above_zero,
        metavar="X",
        help="with --validate: what one rank computes; adds hours",
    )
    parse.add_argument(
        "--device-memory-gb",
        type=_above_zero,
        metavar="X",
        help="with --validate: plan for GPUs with so much memory",
    )
    parse.add_argument(
        "--dry-run", type=_positive, metavar="N", help="make N real steps and write nothing"
    )
    parse.add_argument(
        "--profile",
        type=_positive,
        metavar="N",
        help="profile N real steps: <run.folder>/profile/ has a table and a trace",
    )
    parse.add_argument(
        "--export",
        type=_step,
        metavar="STEP",
        help="write the student of a checkpoint as a model, without training: a step that has one, or 'newest'",
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
    """Refuse options of which one would be ignored."""
    modes = ("print_config", "validate", "dry_run", "profile", "export")
    given = [f"--{mode.replace('_', '-')}" for mode in modes if getattr(options, mode) is not None]
    if len(given) > 1:
        parse.error(f"{' and '.join(given)} do different things; give one of them")
    if options.fresh and (options.print_config or options.export is not None):
        parse.error(f"--fresh starts a run over, {given[0]} starts none; give one of them")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from 1 up")
    return int(text)


def _step(text: str) -> int | str:
    if text in ("newest", "latest", "last"):
        return "newest"
    if text == "best":
        raise argparse.ArgumentTypeError(
            "the best student by validation loss is exported while a run lasts: see "
            "<run.folder>/export/<student>-best"
        )
    number = text.removeprefix("step-")
    if not number.isdecimal():
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected a step that has a checkpoint, or 'newest'"
        )
    return int(number)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parse = parser()
    options = parse.parse_args(arguments)
    if options.world_size and not options.validate:
        parse.error(
            "--world-size is read only with --validate; the launcher sets the ranks of a run"
        )
    for option in ("tokens_per_second", "device_memory_gb"):
        if getattr(options, option) and not options.validate:
            parse.error(f"--{option.replace('_', '-')} is read only with --validate")
    _check_together(parse, options)
    is_main = os.environ.get("RANK", "0") == "0"
    _set_up_messages(is_main, options.debug)
    log = logging.getLogger("scaledistill")
    try:
        check_numbers()
    except ConfigError as error:
        log.error("%s", error)
        return error.exit_code
    try:
        config = load_config(options.config, options.overrides)
        if not options.print_config:
            check_paths(config, options.config)
    except ConfigError as error:
        # One message a machine: each reads its own file.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            log.error("%s", error)
        return _after_report(error.exit_code, "LOCAL_RANK")
    try:
        if options.print_config:
            if is_main:
                sys.stdout.write(config.to_json())
            return EXIT_DONE
        if options.export is not None:
            return _export(config, options.export, is_main)
        if options.validate:
            # The process is short and nearly all of it imports, among which garbage is looked for
            # in vain.
            gc.disable()
            try:
                return _validate(config, options, is_main)
            finally:
                gc.enable()
        from scaledistill.training.loop import distill

        under_elastic = "TORCHELASTIC_RUN_ID" in os.environ
        # --fresh was done the first time.
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        result = distill(
            config,
            fresh=options.fresh and not restarted,
            dry_run_steps=options.dry_run,
            profile_steps=options.profile,
        )
        log.info("%s", result.message)
        if result.exit_code == EXIT_STOPPED and under_elastic:
            return EXIT_DONE  # torchrun would start a stopped run again; status.json tells
        return result.exit_code
    except (ConfigError, DataError, DivergedError) as error:
        if options.debug:
            raise
        log.error("%s", error)
        return error.exit_code
    except PeerError as error:
        return _after_report(error.exit_code, "RANK")
    except RuntimeError as error:
        from scaledistill.distributed.ranks import explain_lost_peer

        if options.debug or (message := explain_lost_peer(error)) is None:
            raise
        log.error("%s", message)
        return EXIT_ENVIRONMENT
    except KeyboardInterrupt:
        from scaledistill.run.resume_hint import resume_hint

        trial = options.dry_run or options.profile or options.validate or options.print_config
        if is_main:
            log.error("interrupted%s", "" if trial else f"; {resume_hint(config.run.folder)}")
        return EXIT_INTERRUPTED


def _export(config: DistillConfig, step: int | str, is_main: bool) -> int:
    if is_main:
        from scaledistill.training.exports import export_checkpoint

        folder = export_checkpoint(config, step)
        logging.getLogger("scaledistill").info("the student is in %s", folder)
    return EXIT_DONE


def _after_report(code: int, name: str) -> int:
    """Return an exit code, after the rank whose number `name` is 0 has had the time to report why.

    Launchers end all ranks of their machine as soon as one fails. So the ranks that leave the
    message to another one leave after it: as soon as that one has left, the launcher ends them.
    """
    numbers = (os.environ.get(each, "0") for each in (name, "RANK", "LOCAL_RANK"))
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

    from scaledistill.preflight.checks import check
    from scaledistill.preflight.report import placement_table, plan_table, warnings_of
    from scaledistill.run.folder import described
    from scaledistill.storage.files import in_use

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = options.world_size or int(
        os.environ.get("WORLD_SIZE", max(1, torch.cuda.device_count()))
    )
    stated = options.device_memory_gb and int(options.device_memory_gb * 1e9)
    plan = check(config, ranks, device, fresh=options.fresh, gpu_bytes=stated)
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
            f"({described(Path(config.run.folder))}); this configuration starts when that has "
            "ended, or with another run.folder. Everything else is in order"
        )
    console.print("all checks passed (weights not loaded)")
    return EXIT_DONE


def _set_up_messages(is_main: bool, debug: bool) -> None:
    """Show our messages, rank 0's alone unless they are warnings; keep third parties quiet."""
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
        where = "" if is_main else f"[rank {os.environ['RANK']}] "
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s {where}%(levelname)s %(message)s", "%H:%M:%S")
        )
    package.handlers[:] = [handler]
    package.propagate = False
    package.setLevel(logging.DEBUG if debug else logging.INFO if is_main else logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:
        warnings.filterwarnings("ignore")
        # It tells where there is no home to keep fonts in.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
        os.environ.setdefault("DS_LOG_LEVEL", "error")


if __name__ == "__main__":
    sys.exit(main())
