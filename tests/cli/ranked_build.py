"""One rank of ``glmexport build`` as torchrun starts it, with a quick validation that measures no speed.

An argument such as ``1:--threads=2`` is given to the rank of that number alone.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import builds  # noqa: E402

import glmexport.validation.performance  # noqa: E402
import glmexport.workflows.validate  # noqa: E402
from glmexport.cli import main  # noqa: E402
from glmexport.validation.conditions import BehaviourPlan  # noqa: E402
from glmexport.workflows.validate import BuildOptions  # noqa: E402

ASKED = BehaviourPlan(each=1, translations=0, max_tokens=4, batch=2)


def options(*values: Any, **named: Any) -> BuildOptions:
    return BuildOptions(*values, **(named | {"validation": replace(builds.QUICK, behaviour=ASKED)}))


if __name__ == "__main__":
    glmexport.workflows.validate.BuildOptions = options  # type: ignore[assignment,misc]
    glmexport.validation.performance.take_turns = builds.no_turns
    sys.argv[1:] = [
        argument.removeprefix(f"{os.environ['RANK']}:")
        for argument in sys.argv[1:]
        if not re.match(r"\d:", argument) or argument.startswith(f"{os.environ['RANK']}:")
    ]
    sys.exit(main.run_command())
