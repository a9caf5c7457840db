"""The numbers behind a synthetic picture: what makes a person, and what makes a view of one.

Lengths are in units where the picture spans [-1, 1] and v points down; colours are in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["IDENTITY_TRAITS", "VIEW_TRAITS", "Traits"]

# Name: (lowest, highest).
IDENTITY_TRAITS: dict[str, tuple[float, float]] = {
    # Head, ears and hair.
    "head_width": (0.46, 0.62),
    "head_height": (0.62, 0.84),
    "jaw_taper": (-0.1, 0.45),
    "jaw_curve": (-0.1, 0.5),
    "cheek": (-0.05, 0.08),
    "cheek_v": (0.0, 0.4),
    "ear_size": (0.05, 0.13),
    "hair_width": (0.5, 0.78),
    "hair_height": (0.6, 0.85),
    "lock_width": (0.2, 0.75),
    "lock_length": (-0.4, 0.5),
    "hairline": (-0.68, -0.38),
    "hairline_curve": (-0.6, 0.8),
    "fringe": (-0.5, 0.5),
    "part": (-0.35, 0.35),
    "beard": (-0.8, 0.9),
    "beard_top": (0.2, 0.6),
    # Colours.
    "skin_r": (0.50, 0.95),
    "skin_g": (0.38, 0.76),
    "skin_b": (0.28, 0.66),
    "hair_r": (0.05, 0.80),
    "hair_g": (0.05, 0.65),
    "hair_b": (0.05, 0.55),
    "iris_r": (0.05, 0.55),
    "iris_g": (0.10, 0.65),
    "iris_b": (0.05, 0.75),
    "lip_r": (0.40, 0.95),
    "lip_g": (0.15, 0.55),
    "lip_b": (0.15, 0.60),
    # Texture of the skin: two gratings.
    "texture_a": (0.02, 0.22),
    "grate_au": (-4.0, 4.0),
    "grate_av": (-4.0, 4.0),
    "grate_ap": (0.0, 1.0),
    "texture_b": (0.02, 0.16),
    "grate_bu": (-7.0, 7.0),
    "grate_bv": (-7.0, 7.0),
    "grate_bp": (0.0, 1.0),
    # Eyes and brows; eye_v is the height of the eyes, the brows lie brow_height above.
    "eye_distance": (0.17, 0.32),
    "eye_v": (-0.28, -0.04),
    "eye_tilt": (-0.35, 0.35),
    "eye_width": (0.09, 0.17),
    "eye_height": (0.045, 0.11),
    "iris_size": (0.035, 0.085),
    "brow_height": (0.11, 0.24),
    "brow_tilt": (-0.4, 0.4),
    "brow_arch": (-1.0, 3.5),
    "brow_thickness": (0.012, 0.06),
    "brow_width": (0.08, 0.2),
    # Nose and mouth.
    "nose_v": (0.08, 0.32),
    "nose_length": (0.2, 0.45),
    "nose_width": (0.06, 0.18),
    "nose_shade": (0.1, 0.45),
    "mouth_v": (0.36, 0.58),
    "mouth_curve": (-0.5, 0.5),
    "mouth_width": (0.12, 0.32),
    "lip_upper": (0.02, 0.08),
    "lip_lower": (0.02, 0.10),
    # Three moles of one size.
    "mole_size": (0.02, 0.055),
    "mole_au": (-0.45, 0.45),
    "mole_av": (-0.55, 0.65),
    "mole_bu": (-0.45, 0.45),
    "mole_bv": (-0.55, 0.65),
    "mole_cu": (-0.45, 0.45),
    "mole_cv": (-0.55, 0.65),
}

# Name: (value at difficulty 0, how it spreads, how far at difficulty 1). "both": to either side; "up": upwards only;
# "chance": 1 with this probability, else 0.
VIEW_TRAITS: dict[str, tuple[float, str, float]] = {
    # Pose. Roll is the tangent of half the angle.
    "roll": (0.0, "both", 0.22),
    "shift_x": (0.0, "both", 0.29),
    "shift_y": (0.0, "both", 0.29),
    "zoom": (1.05, "both", 0.29),
    "stretch": (1.0, "both", 0.14),
    "shear": (0.0, "both", 0.14),
    "yaw": (0.0, "both", 0.36),
    "pitch": (0.0, "both", 0.29),
    # Expression.
    "eye_open": (1.0, "both", 0.58),
    "gaze": (0.0, "both", 0.058),
    "brow_raise": (0.0, "both", 0.072),
    "smile": (0.0, "both", 0.36),
    "mouth_open": (0.0, "up", 0.11),
    # Light.
    "light_x": (0.0, "both", 1.0),
    "light_y": (0.0, "both", 1.0),
    "shadow_x": (0.6, "both", 2.0),
    "shadow_y": (0.3, "both", 2.0),
    "shadow_edge": (0.4, "both", 0.58),
    "shadow_depth": (0.0, "up", 0.58),
    # Camera.
    "coarse": (0.0, "chance", 0.29),
    "coarse_cells": (24.0, "both", 12.0),
    "blur": (0.0, "up", 0.72),
    "gain": (1.0, "both", 0.65),
    "gamma": (0.0, "both", 0.86),
    "offset": (0.0, "both", 0.22),
    "cast_r": (1.0, "both", 0.43),
    "cast_g": (1.0, "both", 0.43),
    "cast_b": (1.0, "both", 0.43),
    "noise": (0.0, "up", 0.29),
    # Background: a slope between two colours, with stripes.
    "back_ar": (0.5, "both", 1.0),
    "back_ag": (0.5, "both", 1.0),
    "back_ab": (0.5, "both", 1.0),
    "back_br": (0.5, "both", 1.0),
    "back_bg": (0.5, "both", 1.0),
    "back_bb": (0.5, "both", 1.0),
    "back_freq_x": (1.0, "both", 6.0),
    "back_freq_y": (0.0, "both", 6.0),
    "back_phase": (0.0, "both", 1.0),
    "back_slope_x": (0.0, "both", 2.0),
    "back_slope_y": (0.0, "both", 2.0),
    "back_contrast": (0.0, "up", 1.0),
    # What hides parts of the face; all of one colour.
    "glasses": (0.0, "chance", 0.29),
    "lens_width": (0.18, "both", 0.058),
    "lens_height": (0.14, "both", 0.058),
    "lens_tint": (0.0, "up", 1.0),
    "mask": (0.0, "chance", 0.18),
    "mask_top": (0.18, "both", 0.25),
    "patch": (0.0, "chance", 0.43),
    "patch_u": (0.0, "both", 1.4),
    "patch_v": (0.0, "both", 1.4),
    "patch_width": (0.1, "up", 0.36),
    "patch_height": (0.1, "up", 0.36),
    "cover_r": (0.4, "both", 1.0),
    "cover_g": (0.4, "both", 1.0),
    "cover_b": (0.4, "both", 1.0),
}


class Traits:
    """Named traits of n pictures: `person.head_width`, [n, 1, 1]; colours: `person.rgb("skin_")`, [n, 3, 1, 1]."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self._values = values

    @classmethod
    def of_identity(cls, draws: Tensor) -> Traits:
        """Traits of persons from uniform numbers [number of traits, n, 1, 1]."""
        spans = zip(IDENTITY_TRAITS.items(), draws, strict=True)
        return cls({name: low + (high - low) * draw for (name, (low, high)), draw in spans})

    @classmethod
    def of_view(cls, draws: Tensor, difficulty: float) -> Traits:
        """Traits of views from uniform numbers [number of traits, n, 1, 1]."""
        values = {}
        for (name, (neutral, kind, reach)), draw in zip(VIEW_TRAITS.items(), draws, strict=True):
            spread = difficulty * reach
            if kind == "chance":
                values[name] = (draw < spread).float()
            elif kind == "up":
                values[name] = neutral + spread * draw
            else:
                values[name] = neutral + spread * (2.0 * draw - 1.0)
        return cls(values)

    def rgb(self, name: str) -> Tensor:
        """The colour whose channels are the traits name + "r", "g" and "b"."""
        return torch.stack([self._values[name + channel] for channel in "rgb"], 1).clamp_(0.0, 1.2)

    def __getattr__(self, name: str) -> Tensor:
        return self._values[name]
