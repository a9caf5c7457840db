"""Learning-rate schedules as pure functions of the step, and the backbone optimizers."""

from partialfc.optim.build import OPTIMIZERS, build_optimizer, fill_state, set_learning_rate
from partialfc.optim.schedules import SCHEDULES, Cosine, MultiStep, Polynomial, Schedule, learning_rate_at

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Cosine",
    "MultiStep",
    "Polynomial",
    "Schedule",
    "build_optimizer",
    "fill_state",
    "learning_rate_at",
    "set_learning_rate",
]
