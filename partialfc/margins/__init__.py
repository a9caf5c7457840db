"""The mathematics of the losses. Imports torch alone."""

from partialfc.margins.adaptive import AdaCos, AdaFace, CurricularFace, ElasticFace, MagFace
from partialfc.margins.angles import Tail
from partialfc.margins.auxiliary import (
    Auxiliary,
    CenterLoss,
    CenterTerm,
    ContrastiveLoss,
    PairTerm,
    TripletLoss,
)
from partialfc.margins.base import (
    Aggregate,
    GradientMode,
    Margin,
    Need,
    Parameters,
    Row,
    ScaledMargin,
    State,
    target_similarity,
)
from partialfc.margins.binary import SphereFace2, UniFace
from partialfc.margins.fixed import ArcFace, CircleLoss, CombinedMargin, CosFace, NormFace, Softmax
from partialfc.margins.sphere import FNormSphereFace, SphereFace

MARGINS: dict[str, type[Margin]] = {
    "Softmax": Softmax,
    "NormFace": NormFace,
    "SphereFace": SphereFace,
    "FNormSphereFace": FNormSphereFace,
    "CosFace": CosFace,
    "ArcFace": ArcFace,
    "CombinedMargin": CombinedMargin,
    "CircleLoss": CircleLoss,
    "MagFace": MagFace,
    "AdaFace": AdaFace,
    "CurricularFace": CurricularFace,
    "ElasticFace": ElasticFace,
    "AdaCos": AdaCos,
    "SphereFace2": SphereFace2,
    "UniFace": UniFace,
}
"""Every margin by the name a configuration calls it."""

AUXILIARIES: dict[str, type[Auxiliary]] = {
    "CenterLoss": CenterLoss,
    "ContrastiveLoss": ContrastiveLoss,
    "TripletLoss": TripletLoss,
}
"""Every auxiliary term by the name a configuration calls it."""

__all__ = [
    "AUXILIARIES",
    "MARGINS",
    "AdaCos",
    "AdaFace",
    "Aggregate",
    "ArcFace",
    "Auxiliary",
    "CenterLoss",
    "CenterTerm",
    "CircleLoss",
    "CombinedMargin",
    "ContrastiveLoss",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "FNormSphereFace",
    "GradientMode",
    "MagFace",
    "Margin",
    "Need",
    "NormFace",
    "PairTerm",
    "Parameters",
    "Row",
    "ScaledMargin",
    "Softmax",
    "SphereFace",
    "SphereFace2",
    "State",
    "Tail",
    "TripletLoss",
    "UniFace",
    "target_similarity",
]
