"""``python -m cure``."""

from cure.cli import main

main()
