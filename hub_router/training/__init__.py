"""Training of gates: one loop for every method that learns them."""

from hub_router.training.data import Example
from hub_router.training.fit import FitResult, fit
from hub_router.training.settings import TrainingSettings

__all__ = ["Example", "FitResult", "TrainingSettings", "fit"]
