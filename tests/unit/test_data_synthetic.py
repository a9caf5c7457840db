"""Synthetic identities: pure functions of (seed, identity, view), and hard for pixels."""

import zlib

import pytest
import torch
import torch.nn.functional as F

from partialfc.data import SyntheticFaces


def test_pixels_do_not_depend_on_the_chunk():
    for size in (16, 33, 48):
        faces = SyntheticFaces(seed=3, image_size=size)
        identity = torch.arange(70) * 977 + 2**40
        view = torch.arange(70) % 7
        together = faces.render(identity, view)
        shuffled = torch.randperm(70, generator=torch.Generator().manual_seed(size))
        assert faces.render(identity[shuffled], view[shuffled]).equal(together[shuffled])
        alone = torch.cat([faces.render(identity[i : i + 1], view[i : i + 1]) for i in range(0, 70, 7)])
        assert alone.equal(together[::7])
        assert together.shape == (70, 3, size, size)
        assert together.dtype == torch.uint8


def test_chunks_of_any_size_give_the_same_pixels(monkeypatch):
    faces = SyntheticFaces(seed=0, image_size=32)
    identity, view = torch.arange(20), torch.zeros(20, dtype=torch.int64)
    whole = faces.render(identity, view)
    for images_per_chunk in (1, 3, 7):
        monkeypatch.setattr("partialfc.data.synthetic._PIXELS_PER_CHUNK", 1024 * images_per_chunk)
        assert faces.render(identity, view).equal(whole)


def test_seed_identity_and_view_all_count():
    def render(seed, identity, view):
        return SyntheticFaces(seed=seed, image_size=32).render(torch.tensor([identity]), torch.tensor([view]))

    picture = render(0, 5, 1)
    assert render(0, 5, 1).equal(picture)
    for other in (render(1, 5, 1), render(0, 6, 1), render(0, 5, 2)):
        assert (other != picture).float().mean() > 0.5


def test_difficulty_scales_how_views_differ():
    view = torch.arange(12)
    spread = []
    for difficulty in (0.0, 0.2, 0.5, 1.0):
        faces = SyntheticFaces(seed=0, image_size=32, difficulty=difficulty)
        images = torch.stack([faces.render(torch.full((12,), person), view).float() for person in range(8)])
        spread.append(float(images.std(dim=1).mean()))
    assert spread[0] == 0.0
    assert spread == sorted(spread)
    assert spread[2] > 2 * spread[1] > 0


def test_persons_differ_at_difficulty_zero():
    images = SyntheticFaces(seed=0, image_size=32, difficulty=0.0).render(torch.arange(50), torch.zeros(50).long())
    distance = torch.cdist(images.flatten(1).float(), images.flatten(1).float()) / images[0].numel() ** 0.5
    assert distance.fill_diagonal_(99).min() > 4


def test_pixels_alone_do_not_tell_who_it_is():
    labels = torch.arange(100).repeat_interleave(6)
    images = SyntheticFaces(seed=0, image_size=32).render(labels, torch.arange(6).repeat(100))
    embeddings = F.normalize(images.flatten(1).float() - 127.5, dim=1)
    nearest = (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(1)
    assert (labels[nearest] == labels).float().mean() < 0.06


def test_pictures_are_pinned():
    # Only exactly defined arithmetic is used, so that published data sets can be drawn again anywhere.
    images = SyntheticFaces(seed=0, image_size=32).render(torch.arange(64), torch.arange(64))
    assert zlib.crc32(images.numpy().tobytes()) == 0x9DE0D1FE


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="image_size is 8, but must be at least 16"):
        SyntheticFaces(seed=0, image_size=8)
    with pytest.raises(ValueError, match=r"difficulty is 1.5, but must be in \[0, 1\]"):
        SyntheticFaces(seed=0, image_size=32, difficulty=1.5)
