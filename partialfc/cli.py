"""The command line: `partialfc train | evaluate | plan | data ... | checkpoint ... | config-schema`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from partialfc.checkpoint_commands import add_checkpoint_commands
from partialfc.data_commands import add_data_commands
from partialfc.distributed.errors import is_agreed
from partialfc.distributed.ranks import rank_from_environment
from partialfc.supervision.exit_codes import EXIT_BUG, EXIT_OK, EXIT_RETRY, EXIT_USER_ERROR, leave
from partialfc.supervision.signals import StopSignals

__all__ = ["main", "run"]


def main(arguments: Sequence[str] | None = None, *, at_end: Callable[[int], None] = lambda code: None) -> int:
    """Runs one command; returns its exit code, one of `partialfc.supervision.exit_codes`.

    A user's mistake is one message on standard error, and one of ours a traceback.

    Args:
        arguments: of the command line; None for those of this process.
        at_end: called with the exit code, while a signal can no longer change it; it need not return.
    """
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    # Before torch is imported, which takes seconds.
    with StopSignals() if options.command == _train else nullcontext() as signals:
        code = _run(options, signals)
        at_end(code)
    return code


def run() -> None:
    """The `partialfc` command, which does not return."""
    main(at_end=leave)


def _run(options: argparse.Namespace, signals: StopSignals | None) -> int:
    try:
        if signals is not None:
            _train(options, signals)
            return EXIT_OK
        code: int | None = options.command(options)
    except KeyboardInterrupt:
        print("partialfc: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if signals is not None:
            # A launcher that has seen another rank end tells this one to stop, which may have the message to say.
            signals.answered()
        code = _exit_code(error) if signals is not None else _exit_code_of_command(error)
        if code is None:  # one of ours
            traceback.print_exc()
            return EXIT_BUG
        _say(error)
    return code or EXIT_OK


def _exit_code(error: Exception) -> int | None:
    """For an error whose message is enough; None for one of ours, whose traceback is wanted."""
    # Imported late: the message of a mistyped command need not wait for torch.
    from partialfc.checkpoint import CheckpointError, RunLockedError
    from partialfc.distributed.meeting import RendezvousError
    from partialfc.supervision.agreement import SupervisionError, exit_code_of
    from partialfc.train import DivergedError

    if isinstance(error, SupervisionError):
        return error.exit_code
    if isinstance(error, RendezvousError):
        return EXIT_USER_ERROR if error.lasting else EXIT_RETRY
    if isinstance(error, CheckpointError):
        return EXIT_RETRY if error.passing else EXIT_USER_ERROR
    if isinstance(error, RunLockedError):
        return EXIT_RETRY if error.by_same_job else EXIT_USER_ERROR
    if isinstance(error, DivergedError):
        return EXIT_USER_ERROR
    return exit_code_of(error) if isinstance(error, ValueError | OSError | ImportError) else None


def _exit_code_of_command(error: Exception) -> int | None:
    """As for a training, except that nobody starts the others again by themselves."""
    return EXIT_USER_ERROR if isinstance(error, ValueError | OSError | ImportError) else _exit_code(error)


def _say(error: Exception) -> None:
    rank = rank_from_environment()
    if rank and is_agreed(error):  # rank 0 says it
        return
    place = f" (rank {rank})" if rank else ""
    # In one piece, also where output is unbuffered: ranks share the stream, and `print` writes its line end apart.
    sys.stderr.write(f"partialfc: error{place}: {error}\n")


def _train(options: argparse.Namespace, signals: StopSignals) -> None:
    from partialfc.config import load_config
    from partialfc.distributed.meeting import getting_ready
    from partialfc.evaluate import result_table
    from partialfc.train import train

    with getting_ready(on_refusal=signals.defer):
        config = load_config(options.config, options.overrides)
    trained = train(config, signals=signals)
    signals.answered()
    if rank_from_environment() == 0 and trained.verifications:
        print(result_table(trained.verifications))


def _evaluate(options: argparse.Namespace) -> None:
    from partialfc.evaluate import evaluate_run, result_table

    step, verification = evaluate_run(options.run, options.overrides)
    if rank_from_environment() == 0:
        print(result_table({f"step {step}": verification}))


def _plan(options: argparse.Namespace) -> None:
    from partialfc.config import load_config
    from partialfc.plan import Machine, make_plan, parse_bytes, plan_table

    memory_bytes = parse_bytes(options.gpu_memory, name="--gpu-memory")
    rates = options.tflops, options.tflops_fp32, options.bandwidth
    machine = Machine(options.gpus, memory_bytes, *rates, gpus_per_node=options.gpus_per_node)
    config = load_config(options.config, options.overrides)
    print(plan_table(make_plan(config, machine, identities=options.identities)))


def _schema(options: argparse.Namespace) -> None:
    from partialfc.config import json_schema

    print(json.dumps(json_schema(), indent=2))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """As `parse_args`, but overrides may also come after options, where argparse no longer looks for them."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and hasattr(options, "overrides") and not any(text.startswith("-") for text in rest):
        options.overrides, rest = [*options.overrides, *rest], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="partialfc", description="Partial-FC training over millions of identities.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train as a configuration says; also under torchrun")
    train.add_argument("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override one value of the file")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("evaluate", help="verify the newest checkpoint of a run; also under torchrun")
    evaluate.add_argument("run", type=Path, help="the run.directory of a training")
    evaluate.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="override one value of the run's config.yaml"
    )
    evaluate.set_defaults(command=_evaluate)

    _add_plan_command(commands.add_parser("plan", help="what a configuration needs: memory, time, communication"))

    schema = commands.add_parser("config-schema", help="print the JSON schema of configuration files, for editors")
    schema.set_defaults(command=_schema)

    add_data_commands(commands.add_parser("data", help="make, check and rearrange data sets"))
    add_checkpoint_commands(commands.add_parser("checkpoint", help="look at, check, export and rewrite checkpoints"))
    return parser


def _add_plan_command(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("config", type=Path, help="a YAML file; its data need not exist")
    plan.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override one value of the file")
    plan.add_argument("--gpus", type=int, required=True, help="how many, one rank on each")
    plan.add_argument("--gpus-per-node", type=int, default=None, help="how many are in one machine; default: all")
    plan.add_argument("--gpu-memory", required=True, metavar="SIZE", help="of each, such as 80GiB, 80GB or 512MiB")
    plan.add_argument("--identities", type=int, default=None, help="default: head.num_classes, or those of the data")
    plan.add_argument("--tflops", type=float, default=989.0, help="of 16-bit products; default: %(default)s (H100 SXM)")
    plan.add_argument("--tflops-fp32", type=float, default=67.0, help="of float32 products; default: %(default)s")
    plan.add_argument("--bandwidth", type=float, default=3350.0, help="GB/s of GPU memory; default: %(default)s")
    plan.set_defaults(command=_plan)


if __name__ == "__main__":
    run()
