"""``python -m emrrg``: the commands, a line each."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from emrrg.config import run_command
from emrrg.errors import InputError

COMMANDS = {
    "train": "train a model; without arguments, a small one on synthetic images",
    "evaluate": "write reports for a split of the data and score them",
    "generate": "write the report of one study, or of a list of studies",
    "score": "score the reports of any system against references",
    "agreement": "agreement between label sources or annotators",
    "audit": "count parameters, shares and memory",
    "ablate": "comparisons over several trainings and seeds",
    "pointing": "does the attention fall on the finding? (synthetic images)",
    "convert": "weight files to safetensors, adapters to Hugging Face PEFT",
    "export": "a run, its adapters merged, as one plain folder",
    "data prepare": "a data set as it was downloaded to one annotation file",
    "data check": "read every record and image of a data set and list what is wrong",
    "data.phantoms": "write synthetic X-rays with reports as files",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands.

    Args:
        argv: nothing, or ``--help``; None: `sys.argv`.
    Returns:
        0.
    Raises:
        InputError: anything else.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] not in ("-h", "--help"):
        if any(name.split()[0] == words[0] for name in COMMANDS):
            raise InputError(f"{words[0]}: say python -m emrrg.{words[0]}")
        raise InputError(f"{words[0]}: no such command; python -m emrrg lists them")
    width = max(map(len, COMMANDS))
    for name, what in COMMANDS.items():
        print(f"python -m emrrg.{name:<{width}}  {what}")
    print("\nEach has --help.")
    return 0


if __name__ == "__main__":
    run_command(main)
