"""`moebound`: the group of commands, and the one place where errors become exit codes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from moebound import __version__
from moebound.cli import exits
from moebound.cli.bench import bench
from moebound.cli.cache import cache
from moebound.cli.calibrate import calibrate
from moebound.cli.card import card
from moebound.cli.compare import compare
from moebound.cli.compress import compress
from moebound.cli.decompress import decompress
from moebound.cli.demo import demo
from moebound.cli.eval import eval_command
from moebound.cli.fit import fit
from moebound.cli.generate import generate
from moebound.cli.inspect import inspect
from moebound.cli.output import write_json
from moebound.cli.plan import plan
from moebound.cli.profile import profile
from moebound.cli.report import report
from moebound.cli.sensitivity import sensitivity
from moebound.cli.serve import serve
from moebound.cli.study import study
from moebound.cli.thresholds import thresholds
from moebound.cli.verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="moebound")
def cli() -> None:
    """Compress the experts of a Mixture-of-Experts model under a guaranteed error bound.

    \b
    moebound fit MODEL                       how large a model would be, by its config alone
    moebound compress SRC DST --rate 0.3     make the experts small, with a promise on every weight
    moebound verify DST --against SRC        check the promise
    moebound generate DST --prompt TEXT      text, with experts decoded as they are needed

    SRC is a folder with a Hugging Face checkpoint, a model id on the hub, a GGUF file, or
    builtin:wordmath or builtin:wordmath-mixtral, small models that come with moebound. DST is the
    folder that `moebound compress` makes, a store.

    \b
    Exit codes: 0 good; 1 a bound is violated or bytes are corrupt; 2 usage or any other failure.
    """


# What the list in `moebound --help` says: first sentences of docstrings would be cut there.
_IN_THE_LIST = {
    fit: "How large a model would be, by its config alone.",
    inspect: "What is in a checkpoint, a store, or one file of a store.",
    profile: "Which experts a task uses, and how much.",
    study: "What errors in experts do to the model.",
    report: "A page of what a study found, or several side by side.",
    sensitivity: "What compressing each expert would do to the model.",
    calibrate: "What experts get as inputs, to round with regard to it.",
    thresholds: "By what weight experts may be left out while text is made.",
    plan: "A bound for each expert, for compress --plan.",
    compress: "Make the experts small, with a promise on every weight.",
    verify: "Check the promise: every hash and every certificate.",
    compare: "How far a model's predictions moved, with every byte counted.",
    decompress: "Back to an ordinary checkpoint.",
    card: "The model card of a store.",
    cache: "Which experts to keep in memory: policies compared.",
    bench: "Measure codecs, methods and offloading on this machine.",
    demo: "The whole road on a small model, as a page.",
    eval_command: "How many problems of a task a model solves.",
    generate: "Text, with experts decoded as they are needed.",
    serve: "Answer requests, through the OpenAI API.",
}

for command, line in _IN_THE_LIST.items():
    command.short_help = line
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    _prepare_output()
    try:
        # Outside standalone mode, Click returns what the command returned and raises the rest.
        code = cli.main(arguments, prog_name="moebound", standalone_mode=False)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        return _report(error, as_json="--json" in arguments)
    return code if isinstance(code, int) else exits.OK


def _prepare_output() -> None:
    """A name or a text that the terminal cannot write does not end a command, and neither does a
    stdout or stderr that was closed before it began."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for good
            setattr(sys, name, nowhere)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _report(error: BaseException, *, as_json: bool) -> int:
    code = exits.code_for(error)
    if code == exits.BROKEN_PIPE:
        # Python would complain again when it closes stdout on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    if exits.wants_traceback():
        exits.print_traceback(error)
    message = exits.message_for(error)
    # Click before 8.2 prints it itself.
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        click.echo(message, err=True)  # the help itself: nothing else was asked
        return code
    click.echo(f"moebound: {message}", err=True)
    if hint := exits.hint_for(error):
        click.echo(hint, err=True)
    if as_json:
        kind = type(error).__name__
        write_json(
            {"ok": False, "error": {"type": kind, "message": message}, "exit_code": code},
            sys.stdout,
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
