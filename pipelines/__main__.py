"""`python -m saeql.pipelines` is the `saeql` command."""

from .cli import main

main()
