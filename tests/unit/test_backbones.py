"""Backbones: published sizes, shapes, precision, gradients, and the messages of the table."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from partialfc.backbones import BACKBONES, build_backbone

SMALL = ("iresnet10", "mobilefacenet", "vit_tiny")


def images_of(batch: int, size: int, *, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def small(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    width = {} if name.startswith("vit") else {"width": 8}
    return build_backbone(name, embedding_dim=16, image_size=32, **(width | options))


# The four published IResNets have 24.0, 34.1, 43.6 and 65.2 million parameters at 112 pixels and 512 dimensions.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("iresnet10", 17_752_000),
        ("iresnet18", 24_025_600),
        ("iresnet34", 34_139_328),
        ("iresnet50", 43_590_848),
        ("iresnet100", 65_156_160),
        ("iresnet200", 118_833_920),
        ("mobilefacenet", 1_200_512),
        ("vit_tiny", 35_268_352),
        ("vit_small", 89_410_048),
        ("vit_base", 127_238_656),
        ("vit_large", 247_480_576),
    ],
)
def test_number_of_parameters_at_112_pixels_and_512_dimensions(name, expected):
    with torch.device("meta"):
        network = build_backbone(name, embedding_dim=512, image_size=112)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_the_table_is_covered():
    assert set(SMALL) <= set(BACKBONES)
    assert list(BACKBONES) == [
        *(f"iresnet{depth}" for depth in (10, 18, 34, 50, 100, 200)),
        "mobilefacenet",
        *(f"vit_{size}" for size in ("tiny", "small", "base", "large")),
    ]


def test_mobilefacenet_has_a_million_parameters_at_the_128_dimensions_of_the_paper():
    network = build_backbone("mobilefacenet", embedding_dim=128, image_size=112)
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_003_136


def test_iresnet_names_its_parameters_as_the_published_weights_do():
    names = list(small("iresnet18").state_dict())
    assert names[0] == "conv1.weight"
    expected = ("layer1.0.downsample.1.running_mean", "layer4.1.prelu.weight", "bn2.bias", "fc.bias", "features.weight")
    assert set(expected) <= set(names)
    assert not any(name.startswith("layer1.1.downsample") for name in names)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [16, 48])
def test_embeddings_have_the_shape_and_a_batch_variance_of_one(name, size):
    torch.manual_seed(0)
    network = build_backbone(name, embedding_dim=24, image_size=size)
    embeddings = network(images_of(6, size))
    assert embeddings.shape == (6, 24)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.var(0, correction=0), torch.ones(24), atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", SMALL)
def test_all_trainable_parameters_get_a_finite_gradient_and_filters_a_usable_one(name):
    network = small(name)
    target = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    (network(images_of(8, 32)) * target).sum().backward()
    for parameter_name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        # A later batch norm takes out what most biases and scales do, but never what a filter does.
        if parameter.dim() > 1:
            assert parameter.grad.abs().max() > 1e-4, parameter_name


@pytest.mark.parametrize("name", SMALL)
def test_the_scale_of_the_embedding_is_not_trained(name):
    network = small(name)
    fixed = [parameter_name for parameter_name, parameter in network.named_parameters() if not parameter.requires_grad]
    assert fixed == ["features.weight"]
    assert network.features.weight.eq(1).all()


@pytest.mark.parametrize("name", SMALL)
def test_double_precision_agrees_with_single(name):
    single = small(name)
    double = small(name).double()
    images = images_of(6, 32)
    result = double(images.double())
    assert result.dtype == torch.float64
    torch.testing.assert_close(single(images).double(), result, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", SMALL)
def test_autocast_leaves_the_embedding_in_full_precision(name):
    network = small(name)
    images = images_of(6, 32)
    expected = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = network(images)
    assert embeddings.dtype == torch.float32
    assert not torch.equal(embeddings, embeddings.bfloat16().float())
    similarity = torch.cosine_similarity(embeddings, expected)
    assert similarity.min() > 0.95
    assert not torch.equal(embeddings, expected)


def test_a_transformer_without_final_norm_does_not_look_across_the_batch():
    network = small("vit_tiny", final_norm="none").double()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    images = images_of(5, 32).double()
    together = network(images)
    apart = torch.cat([network(images[:1]), network(images[1:])])
    torch.testing.assert_close(together, apart, atol=1e-12, rtol=0)
    together.square().sum().backward()
    assert network.fc.bias.grad.abs().max() > 0


def test_a_transformer_knows_where_a_patch_is():
    network = small("vit_tiny", final_norm="none")
    images = images_of(1, 32)
    assert not torch.allclose(network(images), network(images.roll(8, dims=2)), atol=1e-3)


@pytest.mark.parametrize(
    ("image_size", "options", "tokens"),
    [(112, {}, 196), (152, {}, 361), (160, {}, 100), (224, {}, 196), (112, {"patch_size": 16}, 49)],
)
def test_patch_size_follows_the_image_size_unless_given(image_size, options, tokens):
    with torch.device("meta"):
        network = build_backbone("vit_tiny", embedding_dim=8, image_size=image_size, **options)
    assert network.position_embedding.shape == (1, tokens, 256)


def test_drop_path_leaves_out_branches_of_single_samples_in_training_alone():
    block = small("vit_tiny", drop_path=0.5).blocks[-1]
    tokens = torch.randn(64, 4, 256, generator=torch.Generator().manual_seed(0))
    branch = block.drop_path(tokens)
    dropped = branch.eq(0).all(-1).all(-1)
    assert 16 <= int(dropped.sum()) <= 48
    torch.testing.assert_close(branch[~dropped], 2 * tokens[~dropped])
    assert block.eval().drop_path(tokens) is tokens
    probabilities = [block.drop_path.probability for block in small("vit_tiny", drop_path=0.22).blocks]
    assert probabilities == pytest.approx([0.02 * index for index in range(12)])


def test_iresnet_drops_features_in_training_alone():
    network = small("iresnet10", dropout=0.5)
    images = images_of(4, 32)
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))


def test_iresnet_width_scales_all_stages():
    network = small("iresnet10", width=4)
    stages = (network.layer1, network.layer2, network.layer3, network.layer4)
    assert [stage[0].conv2.out_channels for stage in stages] == [4, 8, 16, 32]
    assert network.fc.in_features == 32 * 2 * 2


@pytest.mark.parametrize("name", ["iresnet10", "mobilefacenet"])
def test_a_small_network_learns_with_plain_sgd(name):
    network = small(name)
    images, target = images_of(8, 32), torch.eye(16)[:8] * 4 - 0.5
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = (network(images) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "iresnt50",
            {},
            r'unknown backbone "iresnt50" \(did you mean "iresnet50"\?\); known are iresnet10, .*vit_large',
        ),
        ("resnext", {"width": 3}, r'unknown backbone "resnext"'),
        (
            "iresnet50",
            {"widht": 3},
            r'^widht is no option of backbone "iresnet50" \(did you mean "width"\?\); .*dropout, width$',
        ),
        (
            "mobilefacenet",
            {"dropout": 0.1},
            r'^dropout is no option of backbone "mobilefacenet"; allowed are width$',
        ),
        ("vit_base", {"depth": 3}, "allowed are drop_path, final_norm, patch_size$"),
        ("iresnet10", {"image_size": 100}, "image_size is 100, but must be a positive multiple of 16, such as 96"),
        ("iresnet10", {"image_size": 0}, "image_size is 0, .* such as 16"),
        ("iresnet10", {"embedding_dim": 0}, "embedding_dim is 0, but must be at least 1"),
        ("iresnet10", {"width": 0}, "^width is 0, but must be an integer of at least 1$"),
        ("iresnet10", {"width": -3}, "^width is -3, but must be an integer of at least 1$"),
        ("iresnet10", {"width": "abc"}, "^width is 'abc', but must be an integer of at least 1$"),
        ("iresnet10", {"width": 8.0}, "^width is 8.0, but must be an integer of at least 1$"),
        ("iresnet10", {"width": True}, "^width is True, but must be an integer of at least 1$"),
        ("iresnet10", {"dropout": 7}, r"^dropout is 7, but must be a number in \[0, 1\)$"),
        ("iresnet10", {"dropout": "abc"}, r"^dropout is 'abc', but must be a number in \[0, 1\)$"),
        ("iresnet10", {"dropout": float("nan")}, r"^dropout is nan, but must be a number in \[0, 1\)$"),
        ("mobilefacenet", {"width": "abc"}, "^width is 'abc', but must be an integer of at least 1$"),
        ("vit_tiny", {"patch_size": 9}, "image_size is 32, but must be a positive multiple of 9, such as 27"),
        ("vit_tiny", {"patch_size": 0}, "^patch_size is 0, but must be an integer of at least 1$"),
        ("vit_tiny", {"patch_size": "abc"}, "^patch_size is 'abc', but must be an integer of at least 1$"),
        ("vit_tiny", {"drop_path": 1.0}, r"^drop_path is 1.0, but must be a number in \[0, 1\)$"),
        ("vit_tiny", {"drop_path": [0]}, r"^drop_path is \[0\], but must be a number in \[0, 1\)$"),
        ("vit_tiny", {"final_norm": "layer"}, """^final_norm is 'layer', but must be "batch" or "none"$"""),
    ],
)
def test_wrong_requests_are_explained(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(name, **({"embedding_dim": 8, "image_size": 32} | options))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(2, 3, 48, 48), (2, 1, 32, 32), (3, 32, 32)])
def test_images_of_another_shape_are_refused(name, shape):
    with pytest.raises(ValueError, match=rf"images have shape \[{', '.join(map(str, shape))}\], .*\[b, 3, 32, 32\]"):
        small(name)(torch.zeros(shape))


def test_timm_that_cannot_be_imported_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ImportError, match=r'"timm:resnet18" needs the timm library, .* pip install "partialfc\[timm\]"'
    ):
        build_backbone("timm:resnet18", embedding_dim=8, image_size=32)


def test_timm_models_are_built_by_name_and_sized(monkeypatch):
    calls = []

    def create_model(name: str, **options: object) -> nn.Module:
        if "bogus" in options:
            raise TypeError("got an unexpected keyword argument 'bogus'")
        model = nn.Identity()
        if name == "vit":
            model.set_input_size = lambda img_size: calls.append(("size", img_size))
        calls.append((name, options))
        return model

    names = ["vit", "resnet18"]
    fake = SimpleNamespace(create_model=create_model, is_model=names.__contains__, list_models=lambda: names)
    monkeypatch.setitem(sys.modules, "timm", fake)
    build_backbone("timm:vit", embedding_dim=8, image_size=32, drop_rate=0.1)
    build_backbone("timm:resnet18", embedding_dim=9, image_size=48)
    assert calls == [
        ("vit", {"num_classes": 8, "drop_rate": 0.1}),
        ("size", 32),
        ("resnet18", {"num_classes": 9}),
    ]
    with pytest.raises(ValueError, match=r'unknown timm model "resnet81" \(did you mean "resnet18"\?\)'):
        build_backbone("timm:resnet81", embedding_dim=8, image_size=32)
    with pytest.raises(ValueError, match=r"^options \{'bogus': 1\} do not go with backbone \"timm:vit\": got an unexp"):
        build_backbone("timm:vit", embedding_dim=8, image_size=32, bogus=1)
