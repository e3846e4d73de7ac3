"""``cure analyse STUDY``: a file a study."""

from cure.cli.analyse import cka as cka
from cure.cli.analyse import gradients as gradients
from cure.cli.analyse import landscape as landscape
from cure.cli.analyse import layerwise as layerwise
from cure.cli.analyse import minimal_perturbation as minimal_perturbation
from cure.cli.analyse import overfitting as overfitting
from cure.cli.analyse import prediction_flips as prediction_flips
from cure.cli.analyse import sensitivity as sensitivity
from cure.cli.analyse.app import analyse

__all__ = ["analyse"]
