"""``python -m glmexport``."""

from glmexport.cli.main import main

main()
