"""Augmentation: keyed draws, and what they do to pixels."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from partialfc.data.augment import (
    Augmentation,
    AugmentationParameters,
    apply_augmentation,
    gaussian_window,
    horizontal_flips,
)
from partialfc.data.plan import Draws

EVERYTHING = Augmentation(
    crop=0.5, color=0.5, hue_degrees=30.0, grayscale=0.5, blur=0.5, occlusion=0.5, occlusion_area=(0.02, 0.5)
)
FIELDS = [field.name for field in dataclasses.fields(AugmentationParameters)]


def draws(number, *, visit=0, first=0):
    ids = torch.arange(first, first + number)
    return Draws(ids, torch.full_like(ids, visit))


def picture(height=24, width=24):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def changed(pixels, image_size=None, **parameters):
    tensors = {name: torch.as_tensor([value]) for name, value in parameters.items()}
    size = image_size or pixels.shape[0]
    return apply_augmentation(pixels, AugmentationParameters(**tensors), slot=0, image_size=size)


def matrix(augmentation, number=0):
    """The drawn colour change of a sample whose colours are changed for certain."""
    return augmentation.draw(draws(number + 1), seed=0).color[number]


def test_flips_are_those_of_earlier_versions():
    parameters = Augmentation().draw(draws(16, visit=3), seed=11)
    expected = [0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1]
    assert parameters.flip.int().tolist() == expected
    assert horizontal_flips(torch.full((16,), 3), torch.arange(16), seed=11).int().tolist() == expected


def test_only_mirroring_is_on_by_default_and_copies_nothing():
    parameters = Augmentation().draw(draws(8), seed=0)
    assert [name for name in FIELDS if getattr(parameters, name) is not None] == ["flip"]
    pixels = picture()
    for slot, flip in enumerate(parameters.flip.tolist()):
        result = apply_augmentation(pixels, parameters, slot=slot, image_size=24)
        assert np.shares_memory(result, pixels)
        np.testing.assert_array_equal(result, pixels[:, ::-1] if flip else pixels)
    nothing = Augmentation(horizontal_flip=0.0).draw(draws(8), seed=0)
    assert nothing == AugmentationParameters()


def test_draws_depend_on_seed_visit_and_id_alone():
    together = EVERYTHING.draw(draws(40, visit=2), seed=5)
    apart = EVERYTHING.draw(draws(10, visit=2, first=30), seed=5)
    for name in FIELDS:
        assert getattr(together, name)[30:].equal(getattr(apart, name)), name
    for other in (EVERYTHING.draw(draws(40, visit=3), seed=5), EVERYTHING.draw(draws(40, visit=2), seed=6)):
        for name in FIELDS:
            assert not getattr(other, name).equal(getattr(together, name)), name


def test_turning_an_operation_on_leaves_the_others_as_they_are():
    alone, together = Augmentation(blur=0.5).draw(draws(40), seed=5), EVERYTHING.draw(draws(40), seed=5)
    assert alone.blur_sigma.equal(together.blur_sigma)
    assert alone.flip.equal(together.flip)


def test_draws_have_the_stated_probability_and_range():
    number = 20000
    parameters = Augmentation(
        horizontal_flip=0.2,
        crop=0.3,
        crop_area=(0.25, 0.81),
        blur=0.4,
        blur_sigma=(1.0, 3.0),
        occlusion=0.6,
        occlusion_area=(0.04, 0.16),
    ).draw(draws(number), seed=1)
    left, top, right, bottom = parameters.crop.double().unbind(1)
    cropped = right - left < 1.0
    area = (right - left) * (bottom - top)
    covered = parameters.occlusion[:, 2:] - parameters.occlusion[:, :2]
    occluded = covered[:, 0] > 0
    occluded_area, ratio = covered.prod(1)[occluded], (covered[:, 0] / covered[:, 1])[occluded]
    blurred = parameters.blur_sigma > 0
    for share, expected in (
        (parameters.flip, 0.2),
        (cropped, 0.3),
        (blurred, 0.4),
        (occluded, 0.6),
    ):
        assert share.double().mean() == pytest.approx(expected, abs=0.015)
    torch.testing.assert_close(right - left, bottom - top, atol=1e-6, rtol=0)
    assert 0.0 <= left.min()
    assert right.max() <= 1.0
    assert left[cropped].mean() == pytest.approx(float((1.0 - right + left)[cropped].mean()) / 2, abs=0.005)
    for values, low, high in (
        (area[cropped], 0.25, 0.81),
        (parameters.blur_sigma[blurred], 1.0, 3.0),
        (occluded_area, 0.04, 0.16),
        (ratio.log2(), -1.0, 1.0),
    ):
        assert low - 1e-6 <= values.min() <= low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) <= values.max() <= high + 1e-6
        assert values.double().mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))


def test_crop_cuts_out_its_box():
    pixels = picture(40, 80)
    box = [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_array_equal(changed(pixels[:, :40], 20, crop=box), pixels[20:40, 10:30])
    expected = Image.fromarray(pixels).resize((24, 24), Image.Resampling.BILINEAR, box=(20, 20, 60, 40))
    np.testing.assert_array_equal(changed(pixels, 24, crop=box), np.asarray(expected))


def test_images_of_another_size_are_resized():
    pixels = picture(31, 17)
    expected = np.asarray(Image.fromarray(pixels).resize((24, 24), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(changed(pixels, 24), expected)
    np.testing.assert_array_equal(changed(pixels, 24, flip=True), expected[:, ::-1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"brightness": 0.5}, lambda rgb, factor: rgb * factor),
        ({"contrast": 0.5}, lambda rgb, factor: (rgb - 127.5) * factor + 127.5),
        (
            {"saturation": 0.5},
            lambda rgb, factor: (luma := rgb @ [0.299, 0.587, 0.114])[..., None] + factor * (rgb - luma[..., None]),
        ),
    ],
)
def test_color_changes_are_as_described(options, expected):
    augmentation = Augmentation(**({"brightness": 0, "contrast": 0, "saturation": 0} | options), color=1.0)
    factors, pixels = [], picture()
    for number in range(60):
        color = matrix(augmentation, number)
        factor = {
            "brightness": color[:, :3].sum(1).mean(),
            "contrast": color[:, :3].sum(1).mean(),
            "saturation": (color[:, :3].trace() - 1.0) / 2.0,
        }[next(iter(options))]
        factors.append(float(factor))
        result = changed(pixels, color=color.tolist())
        wanted = expected(pixels.astype(np.float64), float(factor)).clip(0, 255)
        assert np.abs(result - wanted).max() <= 0.51
    assert 0.5 <= min(factors) < 0.65
    assert 1.35 < max(factors) <= 1.5


def test_hue_turns_colors_but_neither_gray_nor_luma():
    augmentation = Augmentation(color=1.0, brightness=0, contrast=0, saturation=0, hue_degrees=90)
    angles = []
    for number in range(20):
        color = matrix(augmentation, number).double()
        turn = color[:, :3]
        torch.testing.assert_close(turn.sum(1), torch.ones(3).double(), atol=1e-5, rtol=0)
        luma = torch.tensor([0.299, 0.587, 0.114]).double()
        torch.testing.assert_close(luma @ turn, luma, atol=2e-3, rtol=0)
        assert float(torch.linalg.det(turn)) == pytest.approx(1.0, abs=1e-3)
        angles.append(math.degrees(math.acos(float((turn.trace() - 1.0) / 2.0))))
        assert color[:, 3].tolist() == [0.0, 0.0, 0.0]
    assert min(angles) < 15
    assert 75 < max(angles) <= 90


def test_grayscale_takes_the_luma_of_the_changed_colors():
    pixels = picture()
    gray = matrix(Augmentation(grayscale=1.0))
    result = changed(pixels, color=gray.tolist())
    assert (result == result[..., :1]).all()
    assert np.abs(result[..., 0] - pixels @ [0.299, 0.587, 0.114]).max() <= 0.51
    both = Augmentation(grayscale=1.0, color=1.0, contrast=0.5)
    color = matrix(Augmentation(color=1.0, contrast=0.5)).double()
    expected = torch.tensor([0.299, 0.587, 0.114]).double() @ color
    torch.testing.assert_close(matrix(both).double(), expected.expand(3, 4), atol=1e-3, rtol=1e-5)


def test_colors_are_clipped_and_not_wrapped():
    doubled = (2.0 * torch.eye(3, 4)).tolist()
    assert changed(np.full((4, 4, 3), 200, np.uint8), color=doubled).tolist() == np.full((4, 4, 3), 255).tolist()
    lowered = (torch.eye(3, 4) - torch.tensor([0, 0, 0, 50.0])).tolist()
    assert changed(np.full((4, 4, 3), 20, np.uint8), color=lowered).max() == 0


@pytest.mark.parametrize("sigma", [0.5, 1.3, 4.0])
def test_blur_is_gaussian(sigma):
    pixels = picture()
    assert gaussian_window(sigma).sum() == pytest.approx(1.0)
    radius = math.ceil(3.0 * sigma)
    expected = ndimage.gaussian_filter(pixels.astype(np.float64), sigma, axes=(0, 1), mode="mirror", radius=radius)
    assert np.abs(changed(pixels, blur_sigma=sigma) - expected).max() <= 0.51
    assert np.shares_memory(changed(pixels, blur_sigma=0.0), pixels)


def test_a_blur_wider_than_the_image():
    flat = np.full((16, 16, 3), 77, np.uint8)
    assert (changed(flat, blur_sigma=20.0) == 77).all()


def test_occlusion_is_a_gray_rectangle_of_the_mirrored_image():
    pixels = picture(20, 20)
    expected = pixels[:, ::-1].copy()
    expected[2:10, 5:20] = 128
    result = changed(pixels, flip=True, occlusion=[0.25, 0.1, 1.0, 0.5])
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(pixels, picture(20, 20))
    np.testing.assert_array_equal(changed(pixels, occlusion=[0.3, 0.3, 0.3, 0.3]), pixels)


def test_changes_follow_each_other_in_their_order():
    pixels, parameters = picture(30, 40), EVERYTHING.draw(draws(60), seed=3)
    for slot in range(60):
        steps = pixels
        for names in (["crop"], ["flip"], ["color"], ["blur_sigma"], ["occlusion"]):
            part = AugmentationParameters(**{name: getattr(parameters, name) for name in names})
            steps = apply_augmentation(steps, part, slot=slot, image_size=24)
        np.testing.assert_array_equal(apply_augmentation(pixels, parameters, slot=slot, image_size=24), steps)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"horizontal_flip": 1.5}, r"horizontal_flip is 1.5, but must be in \[0, 1\]"),
        ({"blur": -0.1}, r"blur is -0.1, but must be in \[0, 1\]"),
        ({"brightness": float("nan")}, "brightness is nan"),
        ({"hue_degrees": 181.0}, r"hue_degrees is 181.0, but must be in \[0, 180\]"),
        ({"crop_area": (0.9, 0.5)}, r"crop_area is \(0.9, 0.5\), but must be \(lowest, highest\) within \[0.01, 1.0\]"),
        ({"crop_area": (0.0, 1.0)}, "crop_area"),
        ({"blur_sigma": (1.0, 200.0)}, r"blur_sigma .* within \[0.1, 20.0\]"),
        ({"occlusion_area": (0.1, 0.6)}, r"occlusion_area .* within \[0.0, 0.5\]"),
        ({"occlusion_area": (0.1,)}, "occlusion_area"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**setting)
