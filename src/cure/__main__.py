"""``python -m cure``."""

from cure.cli.main import main

main()
