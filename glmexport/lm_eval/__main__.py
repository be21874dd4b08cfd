"""lm-eval's command line with one more model.

lm-eval finds models by a registry that nothing outside of it is entered in by itself, so its command line is run from
here, with the model registered::

    python -m glmexport.lm_eval --model glmexport --model_args bundle=DIR --tasks NAME --include_path FOLDER
"""

from __future__ import annotations

import sys

from glmexport.cli.main import tell
from glmexport.foundation.errors import GlmexportError
from glmexport.foundation.extras import missing_package


def main() -> None:
    """What is wrong with the model, or not installed, is told in a sentence."""
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry

        from glmexport.lm_eval.model import NAME

        model_registry.register(NAME, target="glmexport.lm_eval.model:Model")
        cli_evaluate()
    except GlmexportError as error:
        sys.exit(tell(error))
    except ImportError as error:
        absent = missing_package(error)
        if absent is None:
            raise
        sys.exit(tell(absent))


if __name__ == "__main__":
    main()
