"""``cure analyse STUDY``: a file a study."""

from cure.cli.analyse.app import analyse

__all__ = ["analyse"]
