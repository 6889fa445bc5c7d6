"""`python -m unhorse.cli`."""

from unhorse.cli import main

main()
