"""The mathematics of the losses. Imports torch alone."""

from partialfc.margins.base import GradientMode, Margin, Need, Parameters, Row, State, target_similarity
from partialfc.margins.fixed import ArcFace, CombinedMargin, CosFace, NormFace, Softmax, Tail

MARGINS: dict[str, type[Margin]] = {
    "Softmax": Softmax,
    "NormFace": NormFace,
    "CosFace": CosFace,
    "ArcFace": ArcFace,
    "CombinedMargin": CombinedMargin,
}
"""Every margin by the name a configuration calls it."""

__all__ = [
    "MARGINS",
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "GradientMode",
    "Margin",
    "Need",
    "NormFace",
    "Parameters",
    "Row",
    "Softmax",
    "State",
    "Tail",
    "target_similarity",
]
