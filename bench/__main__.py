"""python -m bench COMMAND, or, from another repository, python PATH/TO/bench COMMAND."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

if not __package__:  # started as a directory: there `bench` may name something else
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# One line a command: its module has a docstring, add_arguments(parser) and main(args) -> exit code.
COMMANDS = {
    "ab": "bench.ab",
    "profile": "bench.profile",
    "run": "bench.run",
    "frame": "bench.frame",
    "report": "bench.report",
    "learns": "bench.learns",
    "pretrain": "bench.pretrain",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {name: importlib.import_module(module) for name, module in COMMANDS.items()}
    for name, module in modules.items():
        first, *_ = module.__doc__.splitlines()
        command = commands.add_parser(
            name, help=first, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
    args = parser.parse_args(argv)
    return modules[args.command].main(args)


if __name__ == "__main__":
    sys.exit(main())
