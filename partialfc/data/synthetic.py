"""Procedural identities: face-like pictures as a pure function of (seed, identity, view).

Nothing is stored and nothing is downloaded: 64 numbers of an identity (shape of head and jaw, colours, eyes, brows,
nose, mouth, moles, texture of the skin) and 55 of a view (pose, expression, light, camera, background, occlusion) come
from an integer hash, and a few hundred elementwise operations paint the picture. There are 2^63 identities.

The same picture must come out bit for bit alone and within any chunk. So pixels are made by +, -, *, /, sqrt, abs, min
and max only, which IEEE 754 defines exactly: vectorised exp or sin may differ in the last bit between the body and the
rest of a loop. Bumps are (1 - d^2)^2, waves are parabolas, gamma is a quadratic.

Shapes: n images, H = W = image_size. Planes are [n, H, W], axes [n, 1, W] and [n, H, 1], traits [n, 1, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.data.synthetic_traits import IDENTITY_TRAITS, VIEW_TRAITS, Traits
from partialfc.keyed import hash64, uniform

__all__ = ["SyntheticFaces"]

_IDENTITY, _VIEW, _NOISE = 1, 2, 3
_PIXELS_PER_CHUNK = 1 << 16  # So that the planes at work stay in the cache of one core.


class SyntheticFaces:
    """Draws identities.

    Args:
        seed: another seed, other people.
        image_size: height and width in pixels, at least 16.
        difficulty: how much views of an identity differ: 0 not at all, 1 as much as the painter can.

    Raises:
        ValueError: for an image size below 16 or a difficulty outside [0, 1].
    """

    def __init__(self, *, seed: int, image_size: int, difficulty: float = 0.5) -> None:
        if image_size < 16:
            raise ValueError(f"SyntheticFaces: image_size is {image_size}, but must be at least 16")
        if not 0.0 <= difficulty <= 1.0:
            raise ValueError(f"SyntheticFaces: difficulty is {difficulty}, but must be in [0, 1]")
        self.seed = seed
        self.image_size = image_size
        self.difficulty = difficulty

    def render(self, identity: Tensor, view: Tensor) -> Tensor:
        """Paints pictures; each depends on its own identity and view alone.

        Args:
            identity: int64 [n].
            view: int64 [n], number of the picture of that identity.

        Returns:
            uint8 [n, 3, H, W], RGB.
        """
        images = torch.empty(len(identity), 3, self.image_size, self.image_size, dtype=torch.uint8)
        step = max(1, _PIXELS_PER_CHUNK // self.image_size**2)
        for start in range(0, len(identity), step):
            here = slice(start, start + step)
            images[here] = self._render_chunk(identity[here], view[here])
        return images

    def _render_chunk(self, identity: Tensor, view: Tensor) -> Tensor:
        person = Traits.of_identity(_draw(len(IDENTITY_TRAITS), self.seed, _IDENTITY, identity))
        look = Traits.of_view(_draw(len(VIEW_TRAITS), self.seed, _VIEW, identity, view), self.difficulty)
        x, y = _pixel_axes(look, self.image_size)
        u, v, screen_u, screen_v = _to_face(look, x, y)
        soft = 0.3 * self.image_size
        canvas = _Canvas(_background(look, x, y), soft)
        _paint_head(canvas, person, look, u, v)
        _paint_eyes(canvas, person, look, u, v)
        _paint_nose_and_mouth(canvas, person, look, u, v)
        _paint_moles(canvas, person, u, v)
        _paint_occlusion(canvas, person, look, u, v, screen_u, screen_v)
        noise = _noise(hash64(self.seed, _NOISE, identity, view), self.image_size)
        return _photograph(canvas.rgb, look, u, v, noise)


class _Canvas:
    """RGB planes [n, 3, H, W] that shapes are painted on."""

    def __init__(self, rgb: Tensor, soft: float) -> None:
        self.rgb = rgb
        self.soft = soft

    def paint(self, coverage: Tensor, color: Tensor) -> None:
        """Lays a colour, [n, 3, 1, 1] or [n, 3, H, W], over what is there where coverage [n, H, W] is 1."""
        self.rgb += coverage.unsqueeze(1) * (color - self.rgb)

    def inside(self, distance: Tensor) -> Tensor:
        """Coverage of the shape where `distance` (face units, or nearly so) is below 0, with an edge of a pixel."""
        return distance.mul(-self.soft).add_(0.5).clamp_(0.0, 1.0)


def _draw(count: int, seed: int, kind: int, *words: Tensor) -> Tensor:
    """Float32 uniform numbers [count, n, 1, 1] of each identity, or of each view."""
    number = torch.arange(count)[:, None]
    return uniform(seed, kind, *words, number).float()[..., None, None]


def _wave(phase: Tensor) -> Tensor:
    """A wave of period 1 and height 1 that looks like a sine: parabolas back to back."""
    fraction = phase - phase.floor() - 0.5
    return fraction * (8.0 - 16.0 * fraction.abs())


def _bump(squared_distance: Tensor) -> Tensor:
    """A smooth bump: 1 in the middle, 0 where the squared distance reaches 1."""
    return (1.0 - squared_distance).clamp_(min=0.0).square_()


def _ellipse(x: Tensor, y: Tensor, width: Tensor, height: Tensor) -> Tensor:
    """Nearly the distance to an ellipse: negative inside."""
    return ((x / width).square() + (y / height).square() - 1.0) * (0.5 * torch.minimum(width, height))


def _pixel_axes(look: Traits, image_size: int) -> tuple[Tensor, Tensor]:
    """Centres of the pixels in [-1, 1]; a view of low resolution holds blocks of them equal."""
    axis = ((torch.arange(image_size) + 0.5) * (2.0 / image_size) - 1.0).expand(len(look.coarse), 1, image_size)
    cells = look.coarse_cells.floor()
    blocky = ((axis * cells).floor() + 0.5) / cells
    axis = torch.where(look.coarse > 0.0, blocky, axis).contiguous()
    return axis, axis.transpose(1, 2).contiguous()


def _to_face(look: Traits, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels to coordinates of the face (u right, v down) and, for things before it, those of the upright head."""
    # With t = tan(angle / 2): cos = (1 - t^2) / (1 + t^2), sin = 2 t / (1 + t^2).
    t = look.roll
    norm = 1.0 / (1.0 + t * t)
    cosine, sine = (1.0 - t * t) * norm * look.zoom, 2.0 * t * norm * look.zoom
    x, y = x - look.shift_x, y - look.shift_y
    head_u = cosine * x - sine * y
    head_v = (sine * x + cosine * y) * look.stretch
    # The face is a dome: turning it moves its middle further than its rim.
    depth = (1.0 - head_u.square() - 0.6 * head_v.square()).clamp_(min=0.0)
    u = head_u + look.yaw * depth + look.shear * head_v
    v = head_v + look.pitch * depth
    return u, v, head_u, head_v


def _background(look: Traits, x: Tensor, y: Tensor) -> Tensor:
    stripes = _wave(look.back_freq_x * x + look.back_freq_y * y + look.back_phase)
    slope = 0.5 + 0.35 * (look.back_slope_x * x + look.back_slope_y * y)
    mix = (slope + look.back_contrast * stripes).clamp_(0.0, 1.0).unsqueeze(1)
    first, second = look.rgb("back_a"), look.rgb("back_b")
    return first + mix * (second - first)


def _paint_head(canvas: _Canvas, person: Traits, look: Traits, u: Tensor, v: Tensor) -> None:
    """Hair behind, ears, neck, the head with its skin, and the hair before the forehead."""
    hair = person.rgb("hair_")
    crown = v + 0.25
    canvas.paint(canvas.inside(_ellipse(u, crown, person.hair_width, person.hair_height)), hair)
    locks = torch.maximum(u.abs() - person.lock_width, (v - person.lock_length).abs() - 0.45)
    canvas.paint(canvas.inside(locks), hair)
    neck = torch.maximum(u.abs() - 0.3, 0.4 - v)
    skin = person.rgb("skin_")
    canvas.paint(canvas.inside(neck), 0.8 * skin)
    ear_u = u.abs() - person.head_width
    ears = _ellipse(ear_u, v, person.ear_size, 1.6 * person.ear_size)
    canvas.paint(canvas.inside(ears), 0.9 * skin)

    below = v.clamp(min=0.0)
    width = person.head_width * (1.0 - below * (person.jaw_taper + person.jaw_curve * below))
    width = width + person.cheek * _bump(((v - person.cheek_v) * 2.5).square())
    head = _ellipse(u, v, width.clamp_(min=0.15), person.head_height)
    texture = person.texture_a * _wave(person.grate_au * u + person.grate_av * v + person.grate_ap)
    texture += person.texture_b * _wave(person.grate_bu * u + person.grate_bv * v + person.grate_bp)
    inside_head = canvas.inside(head)
    canvas.paint(inside_head, skin * (1.0 + texture).unsqueeze(1))

    parted = u - person.part
    hairline = v - person.hairline - person.hairline_curve * u.square() - person.fringe * parted.abs()
    canvas.paint(canvas.inside(hairline).mul_(inside_head), hair)
    beard = person.beard.clamp(min=0.0) * canvas.inside(person.beard_top + 0.5 * u.square() - v).mul_(inside_head)
    canvas.paint(beard, 0.9 * hair)


def _paint_eyes(canvas: _Canvas, person: Traits, look: Traits, u: Tensor, v: Tensor) -> None:
    side = u.sign()
    eye_u = u.abs() - person.eye_distance
    eye_v = v - person.eye_v - person.eye_tilt * eye_u
    opening = person.eye_height * look.eye_open
    lids = canvas.inside(_ellipse(eye_u, eye_v, person.eye_width + 0.03, opening + 0.03))
    canvas.paint(lids, person.rgb("skin_") * 0.55)
    ball = canvas.inside(_ellipse(eye_u, eye_v, person.eye_width, opening))
    canvas.paint(ball, torch.tensor(0.92))
    gaze_u = eye_u - look.gaze * side
    distance = (gaze_u.square() + eye_v.square()).sqrt_()
    canvas.paint(canvas.inside(distance - person.iris_size).mul_(ball), person.rgb("iris_"))
    canvas.paint(canvas.inside(distance - 0.45 * person.iris_size).mul_(ball), torch.tensor(0.0))

    brow_u = eye_u - 0.02
    brow_v = v - person.eye_v + person.brow_height + look.brow_raise
    brow_v = brow_v - person.brow_tilt * brow_u + person.brow_arch * brow_u.square()
    brow = torch.maximum(brow_v.abs() - person.brow_thickness, brow_u.abs() - person.brow_width)
    canvas.paint(canvas.inside(brow).mul_(0.9), person.rgb("hair_") * 0.8)


def _paint_nose_and_mouth(canvas: _Canvas, person: Traits, look: Traits, u: Tensor, v: Tensor) -> None:
    along = ((v - person.nose_v + person.nose_length) / person.nose_length).clamp(0.0, 1.0)
    half_width = 0.03 + person.nose_width * along.square()
    on_nose = (along * (1.0 - along) * 4.0).clamp_(0.0, 1.0)
    flank = _bump(((u.abs() - half_width) * 12.0).square()) * on_nose
    nostrils = _bump(((u.abs() - 0.6 * person.nose_width) / 0.06).square() + ((v - person.nose_v) / 0.04).square())
    canvas.rgb *= (1.0 - person.nose_shade * flank - 0.6 * nostrils).unsqueeze(1)
    tip = _bump((u / person.nose_width).square() + ((v - person.nose_v + 0.07) / 0.1).square())
    canvas.rgb += (0.12 * tip).unsqueeze(1)

    mouth_v = v - person.mouth_v + (person.mouth_curve + look.smile) * u.square() * 2.0
    width = person.mouth_width * (1.0 + 0.4 * look.smile)
    above = mouth_v < 0.0
    thickness = torch.where(above, person.lip_upper, person.lip_lower + look.mouth_open)
    canvas.paint(canvas.inside(_ellipse(u, mouth_v, width, thickness)), person.rgb("lip_"))
    gap = canvas.inside(_ellipse(u, mouth_v, 0.85 * width, 0.012 + look.mouth_open))
    canvas.paint(gap, torch.tensor(0.12))


def _paint_moles(canvas: _Canvas, person: Traits, u: Tensor, v: Tensor) -> None:
    cover = torch.zeros_like(u)
    places = (
        (person.mole_au, person.mole_av),
        (person.mole_bu, person.mole_bv),
        (person.mole_cu, person.mole_cv),
    )
    for mole_u, mole_v in places:
        distance = ((u - mole_u).square() + (v - mole_v).square()).sqrt_()
        cover = torch.maximum(cover, canvas.inside(distance - person.mole_size))
    canvas.rgb *= (1.0 - 0.7 * cover).unsqueeze(1)


def _paint_occlusion(
    canvas: _Canvas, person: Traits, look: Traits, u: Tensor, v: Tensor, head_u: Tensor, head_v: Tensor
) -> None:
    """Glasses, a mask over mouth and nose, and a patch of one colour; each on some views only."""
    lens = _ellipse(u.abs() - person.eye_distance, v - person.eye_v, look.lens_width, look.lens_height)
    rim = torch.minimum(lens.abs() - 0.02, torch.maximum(u.abs() - 0.12, (v - person.eye_v).abs() - 0.02))
    color = look.rgb("cover_")
    canvas.paint(canvas.inside(rim).mul_(look.glasses), color)
    canvas.paint(canvas.inside(lens).mul_(look.glasses * look.lens_tint.clamp(max=1.0)), color)
    mask = torch.maximum(look.mask_top - v + 0.2 * u.square(), u.abs() - 0.6)
    mask = torch.maximum(mask, v - 0.85)
    canvas.paint(canvas.inside(mask).mul_(look.mask), look.rgb("cover_"))
    patch_u, patch_v = (
        (head_u - look.patch_u).abs() - look.patch_width,
        (head_v - look.patch_v).abs() - look.patch_height,
    )
    canvas.paint(canvas.inside(torch.maximum(patch_u, patch_v)).mul_(look.patch), look.rgb("cover_"))


def _photograph(rgb: Tensor, look: Traits, u: Tensor, v: Tensor, noise: Tensor) -> Tensor:
    """Light, blur, gain, gamma, colour cast and noise of the camera; then 8 bits."""
    light = 1.0 + look.light_x * u.clamp(-1.0, 1.0) + look.light_y * v.clamp(-1.0, 1.0)
    shadow = (4.0 * (u * look.shadow_x + v * look.shadow_y - look.shadow_edge)).clamp_(0.0, 1.0)
    light = (light - look.shadow_depth * shadow).clamp_(min=0.05)
    rgb = rgb * light.unsqueeze(1)
    rgb = _blur(_blur(rgb, look.blur, dim=2), look.blur, dim=3)
    rgb = (rgb * look.rgb("cast_")).mul_(look.gain.unsqueeze(1)).clamp_(0.0, 1.0)
    rgb = rgb + look.gamma.unsqueeze(1) * rgb * (1.0 - rgb)
    rgb = rgb + look.offset.unsqueeze(1) + look.noise.unsqueeze(1) * noise
    return rgb.mul_(255.0).add_(0.5).clamp_(0.0, 255.0).to(torch.uint8)


def _blur(rgb: Tensor, weight: Tensor, *, dim: int) -> Tensor:
    """Mixes each pixel with its neighbours two steps away along one axis, and one step away."""
    for distance in (1, 2):
        size = rgb.shape[dim]
        middle = rgb.narrow(dim, distance, size - 2 * distance)
        around = rgb.narrow(dim, 0, size - 2 * distance) + rgb.narrow(dim, 2 * distance, size - 2 * distance)
        blurred = middle + weight.unsqueeze(1) * (0.5 * around - middle)
        rgb = torch.cat([rgb.narrow(dim, 0, distance), blurred, rgb.narrow(dim, size - distance, distance)], dim)
    return rgb


def _noise(keys: Tensor, image_size: int) -> Tensor:
    """Noise in [-1, 1], [n, 3, H, W], a function of the key of the image: a 32-bit hash of each pixel.

    64-bit products have no vector instruction on most CPUs; 32-bit ones do. Each hash gives the three channels a byte
    and one more that all share, as real cameras err alike in all channels.
    """
    pixel = torch.arange(image_size * image_size, dtype=torch.int32).view(image_size, image_size)
    low, high = (keys & 0x7FFFFFFF).int()[:, None, None], ((keys >> 32) & 0x7FFFFFFF).int()[:, None, None]
    word = (pixel * -1640531527 + low) ^ high  # 2^32 / golden ratio
    for multiplier, shift in ((0x7FEB352D, 15), (-2073254261, 16)):  # "lowbias32", C. Wellons, 2018
        word ^= (word >> shift) & ((1 << (32 - shift)) - 1)
        word *= multiplier
    channels = torch.stack([word & 0xFF, (word >> 8) & 0xFF, (word >> 16) & 0xFF], 1)
    channels += ((word >> 24) & 0xFF).unsqueeze(1)
    return channels.float().mul_(1.0 / 255.0).sub_(1.0)
