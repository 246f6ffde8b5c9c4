"""The command: arguments in, exit code out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from .settings import PROGRAM, LocalUsageError, UsageError, launched_ranks, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, 1 (training failed), 2 (bad input), 130 or 143 (stopped by a signal)."""
    is_main = launched_ranks()[0] == 0

    def say(text: object) -> None:
        if is_main:
            print(text, file=sys.stderr, flush=True)

    try:
        given = parse(sys.argv[1:] if arguments is None else arguments)
        try:
            from .run import StoppedError, TrainingError, train
        except ModuleNotFoundError as error:
            raise UsageError(
                f"{error.name} is not installed; pip install 'fused-ops[train]' brings it"
            ) from None
        try:
            row = train(given)
        except StoppedError as stopped:
            say(stopped)
            return 128 + stopped.number
        except TrainingError as error:
            say(f"{PROGRAM}: {error}")
            return 1
    except LocalUsageError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr, flush=True)
        return 2
    except UsageError as error:
        say(f"{PROGRAM}: error: {error}")
        return 2
    except KeyboardInterrupt:
        say("Stopped before training began.")
        return 130
    if given.get("json") and is_main:
        print(json.dumps([row], indent=2))
    return 0
