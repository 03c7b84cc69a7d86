"""`fieldmark`, with all weights overwritten before one update, once in the life of a run.

    SPOIL_AT=40 .venv/bin/python benchmarks/spoiled.py train digits --out runs/spoiled

The run must go back to its last checkpoint. A run that was killed and resumed in between has gone
back already if its decisions say so, and is not spoiled again.
"""

import os
import sys
from pathlib import Path

from fieldmark.__main__ import main as run
from fieldmark.training import loop

set_rates = loop.set_rates


def main() -> None:
    """Run the command line with the accident in it."""
    at = int(os.environ["SPOIL_AT"])
    decisions = Path(sys.argv[sys.argv.index("--out") + 1]) / "decisions.jsonl"

    def and_spoil(rule: loop.UpdateRule, step: int, factor: float) -> None:
        set_rates(rule, step, factor)
        if step + 1 == at and "rollback 1" not in decisions.read_text():
            for parameter in rule.network.parameters():
                parameter.data.fill_(1e38)

    loop.set_rates = and_spoil
    run()


if __name__ == "__main__":
    main()
