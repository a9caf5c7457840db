"""The plan of a run: what it counts, what it adds up, what it prints, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from partialfc.backbones import build_backbone
from partialfc.cli import main
from partialfc.config import Config, load_config
from partialfc.data import synthesize
from partialfc.distributed.partition import ClassPartition
from partialfc.head import tiles
from partialfc.plan import Machine, Plan, format_bytes, make_plan, parse_bytes, plan_table
from partialfc.plan.backbone import count_backbone
from partialfc.plan.head import count_head, local_rows, peak_bytes

GIB = 2**30
D = 64
SMALL = {
    "run": {"directory": "runs/none"},
    "data": {"directory": "data/none", "image_size": 32},
    "backbone": {"name": "iresnet10", "embedding_dim": D, "options": {"width": 8}},
    "head": {"margin": {"name": "ArcFace"}},
    "training": {"epochs": 1, "global_batch_size": 64},
}


def write(directory: Path, name: str = "small.yaml") -> Path:
    path = directory / name
    path.write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path)


def small_plan(path: Path, *overrides: str, gpus: int = 4, memory: int = GIB, identities: int = 100_000) -> Plan:
    return make_plan(load_config(path, overrides), Machine(gpus, memory), identities=identities)


def bytes_per_class(config: Config) -> dict[str, int]:
    head = count_head(config, config.head, rows=1000, global_batch_size=16, path="head", device="cpu")
    return {part.name: part.bytes_per_class for part in head.parts}


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * GIB), ("80GB", 80 * 10**9), ("512MiB", 2**29), ("1.5 TiB", 3 * 2**39), ("2KB", 2000)],
)
def test_sizes_that_are_understood(text: str, size: int) -> None:
    assert parse_bytes(text, name="--gpu-memory") == size


@pytest.mark.parametrize("text", ["80", "80G", "-1GiB", "0GiB", "GiB", "", "8e1GiB", "80 gib", "1..5GB"])
def test_sizes_that_are_not(text: str) -> None:
    with pytest.raises(ValueError, match=r"--gpu-memory is .* one of GB, GiB, KB, KiB, MB, MiB, TB, TiB") as caught:
        parse_bytes(text, name="--gpu-memory")
    assert repr(text) in str(caught.value)


def test_sizes_are_written_in_the_largest_unit() -> None:
    sizes = [0, 1023, 1024, 1536 * 2**20, 150 * GIB, 5 * 2**40]
    assert [format_bytes(size) for size in sizes] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "1.50 GiB",
        "150.0 GiB",
        "5.00 TiB",
    ]


CENTERS, MOMENTUM = {"class centers": 4 * D}, {"class centers: momentum": 4 * D}
STORED = {
    "sgd": ([], CENTERS | MOMENTUM),
    "no momentum": (["head.optimizer.momentum=0"], CENTERS),
    "bfloat16 momentum": (["head.optimizer.momentum_dtype=bfloat16"], CENTERS | {"class centers: momentum": 2 * D}),
    "int8 momentum": (
        ["head.optimizer.momentum_dtype=int8"],
        CENTERS | {"class centers: momentum": D, "class centers: momentum, scales of 8-bit blocks": 4 * D // 64},
    ),
    "dense decay of all": (["head.optimizer.decay=dense"], CENTERS | MOMENTUM),
    "dense decay of some": (
        ["head.optimizer.decay=dense", "head.sample_rate=0.5"],
        CENTERS | MOMENTUM | {"class centers: step stamps of dense decay": 4},
    ),
    "adamw": (
        ["head.optimizer={name: adamw}"],
        CENTERS | {"class centers: mean": 4 * D, "class centers: variance": 4 * D, "class centers: updates": 4},
    ),
    "adagrad": (["head.optimizer={name: adagrad}"], CENTERS | {"class centers: squares": 4}),
    "float16": (["head.dtype=float16"], {"class centers": 2 * D} | MOMENTUM),
    "sub-centers": (["head.num_subcenters=3"], {"class centers": 12 * D, "class centers: momentum": 12 * D}),
    "center loss": (
        ["head.auxiliaries=[{name: CenterLoss}]"],
        CENTERS | MOMENTUM | {"CenterLoss: centers": 4 * D},
    ),
    "variational": (
        ["head.variational={}"],
        CENTERS | MOMENTUM | {"variational prototypes": 4 * D, "variational prototypes: seen": 8},
    ),
    "bias": (["head.margin={name: Softmax}"], CENTERS | MOMENTUM | {"class bias": 4, "class bias: momentum": 4}),
}


@pytest.mark.parametrize("name", STORED)
def test_what_is_stored_for_each_class(path: Path, name: str) -> None:
    overrides, expected = STORED[name]
    assert bytes_per_class(load_config(path, overrides)) == expected


def test_what_is_stored_once_is_no_part_of_a_class(path: Path) -> None:
    config = load_config(path, ["head.margin={name: SphereFace2}"])
    head = count_head(config, config.head, rows=1000, global_batch_size=16, path="head", device="cpu")
    assert head.bytes_per_class == 8 * D
    assert head.replicated_bytes == 8  # its bias and the momentum of that
    assert head.table_bytes(1000, on_host=False) == 8 + 1000 * 8 * D


def test_offloaded_tables_are_on_the_host_and_the_rows_of_a_step_on_the_gpu(path: Path) -> None:
    sampled = ["head.sample_rate=0.1", "head.auxiliaries=[{name: CenterLoss}]"]
    there, here = (small_plan(path, *sampled, f"head.offload={value}") for value in ("true", "false"))
    rows = local_rows(100_000, 4)
    in_play = round(0.1 * rows) + 16
    assert there.host_bytes == rows * 8 * D
    assert here.host_bytes == 0
    assert here.gpu_bytes - there.gpu_bytes == (rows - in_play) * 8 * D
    assert there.most_identities > 2 * here.most_identities
    text = plan_table(there)
    assert "class centers (float32, in host memory)" in text
    assert "CenterLoss: centers (float32) " in text
    assert "staged rows of a step" in text
    of_tables = ("host memory for tables of this rank", "host memory that each rank needs for so many")
    assert all(words in text for words in of_tables)
    assert not any(words in plan_table(here) for words in ("in host memory", *of_tables))
    with pytest.raises(ValueError, match="offload is True, but sample_rate is 1"):
        small_plan(path, "head.offload=true")


def test_without_tiles_memory_of_a_step_grows_with_the_classes(path: Path) -> None:
    step = small_plan(path, "head.fused=false").heads["main"].step
    # Beside the logits and what comes of them, a unit copy, two gradients and more of each center.
    assert step.bytes_for(2 * 10**6) - step.bytes_for(10**6) > 10**6 * (3 * 4 * D + 2 * 4 * 64)
    # Without autograd one tile is enough.
    assert step.bytes_for(10**6) > 3 * small_plan(path).heads["main"].step.bytes_for(10**6)


def test_rows_are_those_of_the_fullest_rank() -> None:
    for num_classes, num_ranks in ((100_000, 4), (1_000_003, 7), (10, 16), (257 * 256, 256)):
        parts = [ClassPartition(num_classes, rank, num_ranks) for rank in range(num_ranks)]
        fullest = max(part.num_local_classes for part in parts)
        assert 0 <= local_rows(num_classes, num_ranks) - fullest < parts[0].block_size


def test_memory_of_a_step_does_not_grow_with_the_classes(path: Path) -> None:
    few, many = (small_plan(path, identities=count).heads["main"].step for count in (10**6, 10**8))
    assert few.bytes_for(10**6 // 4) <= few.bytes_for(10**8) == many.bytes_for(10**8) == many.bytes_for(10**9) > 0


@pytest.mark.parametrize(
    ("overrides", "too_much"),
    [
        ([], 0.02),
        (["head.sample_rate=0.3"], 0.05),
        (["head.margin={name: CurricularFace}"], 0.02),
        # The kernels of the CPU take buffers of a constant size, which a GPU does not have at all.
        (["head.optimizer.momentum_dtype=int8"], 0.3),
    ],
    ids=["all", "sampled", "transformed", "int8"],
)
def test_small_steps_stand_for_large_ones(
    path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], too_much: float
) -> None:
    """With the larger tiles of a GPU a step is measured at a quarter of the size, or, if they are the CPU's, whole."""
    config = load_config(path, ["backbone.embedding_dim=512", *overrides])

    def most_bytes(device: str) -> float:
        return count_head(
            config, config.head, rows=10**6, global_batch_size=256, path="head", device=device
        ).step.most_bytes

    monkeypatch.setattr(tiles, "ROWS_AT_ONCE", 1024)
    monkeypatch.setitem(tiles.TILE_NUMBERS, "cpu", 2**17)
    monkeypatch.setitem(tiles.TILE_NUMBERS, "cuda", 2**21)
    scaled = most_bytes("cuda")
    monkeypatch.setitem(tiles.TILE_NUMBERS, "cpu", 2**21)
    # Tiles are of whole runs of 64 classes, small ones of fewer runs than a quarter of the large.
    assert 0.92 < scaled / most_bytes("cpu") < 1 + too_much


def test_peak_bytes_follow_release() -> None:
    def step() -> None:
        for _ in range(3):
            first = torch.zeros(1000)
            second = first + 1
            second.view(10, 100).mul_(2)
            del first, second
            standing.add_(1)
        torch.zeros(1500)

    standing = torch.zeros(10**6)
    assert peak_bytes(step, standing=[standing]) == 8000


def kept_by_a_real_forward(config: Config, num_images: int) -> int:
    backbone = build_backbone("iresnet10", embedding_dim=D, image_size=32, width=8)
    standing = {tensor.untyped_storage().data_ptr() for tensor in [*backbone.parameters(), *backbone.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = backbone(torch.zeros(num_images, 3, 32, 32))
    assert result.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in standing)


def test_activations_are_those_of_a_real_forward_pass(path: Path) -> None:
    config = load_config(path)
    cost = count_backbone(config)
    assert cost.activation_bytes(6) == kept_by_a_real_forward(config, 6)
    # Half as many bytes, but for what batch norm and PReLU keep in float32.
    half = count_backbone(load_config(path, ["training.precision=bf16"])).image_activation_bytes
    assert 0.4 < half / cost.image_activation_bytes < 0.8


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 1), ("adamw", 2)])
def test_parameters_gradients_and_state_of_the_backbone(path: Path, optimizer: str, copies: int) -> None:
    cost = count_backbone(load_config(path, [f"optimizer.name={optimizer}"]))
    backbone = build_backbone("iresnet10", embedding_dim=D, image_size=32, width=8)
    tensors = list(backbone.parameters())
    assert cost.num_parameters == sum(tensor.numel() for tensor in tensors if tensor.requires_grad)
    assert cost.gradient_bytes == 4 * cost.num_parameters
    assert cost.parameter_bytes == sum(tensor.nbytes for tensor in [*tensors, *backbone.buffers()])
    steps = 0 if copies == 1 else 4 * len(tensors)
    assert cost.optimizer_bytes - copies * cost.gradient_bytes in range(steps + 1)


def test_flop_of_a_transformer_have_attention(tmp_path: Path) -> None:
    values = SMALL | {"backbone": {"name": "vit_tiny", "embedding_dim": D}}
    path = tmp_path / "vit.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    width, depth, tokens, patch = 256, 12, 16, 8
    # Of a block: queries, keys, values; their product, and that with the values; projection; an MLP four times as wide.
    block = tokens * width * (3 * width + 2 * tokens + width + 8 * width)
    ends = tokens * 3 * patch**2 * width + tokens * width * D
    found = count_backbone(load_config(path)).forward_flop
    assert found == 2 * (depth * block + ends)


def test_the_most_identities_fit_and_one_block_more_does_not(path: Path) -> None:
    plan = small_plan(path, gpus=3)
    most = plan.most_identities
    assert most % (3 * 256) == 0
    assert small_plan(path, gpus=3, identities=most).gpu_bytes <= GIB
    assert small_plan(path, gpus=3, identities=most + 1).gpu_bytes > GIB
    # Nearly all of the memory is for tables: 8 D bytes a class.
    assert most * 8 * D > 0.6 * 3 * GIB


def test_without_room_for_the_backbone_no_identity_fits(path: Path) -> None:
    plan = small_plan(path, memory=2**20)
    assert plan.most_identities == 0
    assert "does NOT fit" in plan_table(plan)


def test_times_follow_from_counts_and_rates(path: Path) -> None:
    config = load_config(path)

    def plan(**rates: float) -> Plan:
        return make_plan(config, Machine(4, GIB, **rates), identities=100_000)

    rows = local_rows(100_000, 4)
    bound_by_compute = plan(tflops_fp32=1.0, bandwidth_gb=1e9)
    assert bound_by_compute.head_seconds == pytest.approx(8 * 64 * rows * D / 1e12)
    half = load_config(path, ["head.matmul_dtype=bfloat16", "training.precision=bf16"])
    faster = make_plan(half, Machine(4, GIB, tflops=2.0, tflops_fp32=1.0, bandwidth_gb=1e9), identities=100_000)
    assert faster.head_seconds == pytest.approx(bound_by_compute.head_seconds / 2)
    assert faster.backbone_seconds == pytest.approx(3 * 16 * faster.backbone.forward_flop / 2e12)
    bound_by_memory = plan(tflops_fp32=1e9, bandwidth_gb=1.0)
    # Centers are read twice and written, momentum read and written.
    assert bound_by_memory.head_seconds == pytest.approx(rows * 5 * 4 * D / 1e9)
    assert bound_by_compute.backbone_seconds == pytest.approx(3 * 16 * bound_by_compute.backbone.forward_flop / 1e12)


def test_collectives(path: Path) -> None:
    plan = small_plan(path)
    gradient = plan.backbone.gradient_bytes
    assert [size for _, size, _ in plan.communication] == [64 * D * 4, 8 * (64 + 4), 2 * 64 * 4, 64 * D * 4, gradient]
    assert [sent for _, _, sent in plan.communication][-2:] == [0.75 * 64 * D * 4, 1.5 * gradient]
    unbounded = small_plan(path, "head.margin={name: Softmax}")
    assert unbounded.communication[2][1] == 3 * 64 * 4
    assert small_plan(path, gpus=1).communication == []


def test_embeddings_in_16_bits_are_half_the_bytes(path: Path) -> None:
    sizes = [size for _, size, _ in small_plan(path, "head.gather_dtype=bfloat16").communication]
    assert sizes[:-1] == [64 * D * 2, 8 * (64 + 4), 2 * 64 * 4, 64 * D * 2]


NODES = Machine(4, GIB, gpus_per_node=2)


def test_class_centers_over_nodes(path: Path) -> None:
    """What a node sends, by hand: a ring over all ranks leaves it once; with replicas there is one for each rank."""
    plan = make_plan(load_config(path), NODES, identities=1000)
    flat = 0.75 * (64 * D * 4 + 8 * (64 + 4) + 2 * 2 * 64 * 4 + 64 * D * 4)
    assert plan.layouts["all"].network_bytes == plan.network_bytes == flat
    node, rows = plan.layouts["node"], local_rows(1000, 2)
    assert node.rows("main") == rows == 504
    assert node.network_bytes == 2 * (0.5 * 8 * (64 + 4) + 2 * 0.5 * rows * D * 4)
    # In a node only its share of the batch is gathered.
    assert [size for _, size, _ in node.communication] == [
        32 * D * 4,
        8 * (32 + 2),
        2 * 32 * 4,
        32 * D * 4,
        8 * (64 + 4),
        rows * D * 4,
        plan.backbone.gradient_bytes,
    ]
    assert node.heads["main"].table_bytes(rows, on_host=False) == 2 * 4 * D * rows
    assert "recommended: head.shard_over=all, since a node sends less" in plan_table(plan)


def test_few_classes_in_play_are_better_on_each_node(path: Path) -> None:
    overrides = ["training.global_batch_size=4096", "head.shard_over=node"]
    plan = make_plan(load_config(path, overrides), NODES, identities=500)
    assert plan.network_bytes == plan.layouts["node"].network_bytes < plan.layouts["all"].network_bytes
    assert "recommended: head.shard_over=node, since a node sends less" in plan_table(plan)
    sampled = make_plan(load_config(path, ["head.sample_rate=0.1"]), NODES, identities=10_000).layouts["node"]
    # Of the labels of the global batch, a shard has half.
    assert sampled.rows_in_play("main") == round(0.1 * local_rows(10_000, 2)) + 32
    # Twice as many on each GPU.
    config = load_config(path)
    all_bytes, node_bytes = (each.gpu_bytes for each in make_plan(config, NODES, identities=100_000).layouts.values())
    assert node_bytes > all_bytes + 0.8 * 25_000 * 8 * D
    many = make_plan(config, Machine(4, node_bytes - 1, gpus_per_node=2), identities=100_000)
    assert many.layouts["all"].fits
    assert not many.layouts["node"].fits
    assert "head.shard_over=all, since with node a GPU has too little memory" in plan_table(many)


def test_options_that_do_not_go_on_each_node(path: Path) -> None:
    overrides = ["head.sample_rate=0.5", "head.offload=true"]
    plan = make_plan(load_config(path, overrides), NODES, identities=1000)
    assert list(plan.layouts) == ["all"]
    assert "an option of a head does not go with head.shard_over=node" in plan_table(plan)
    with pytest.raises(
        ValueError, match=r"head: class centers that are replicated over nodes .* with offload; set it to"
    ):
        make_plan(load_config(path, [*overrides, "head.shard_over=node"]), NODES, identities=1000)
    # On one node there is nothing to replicate over.
    alone = small_plan(path, *overrides, "head.shard_over=node")
    assert alone.layouts == {}
    assert "over nodes" not in plan_table(alone)


def test_other_tasks_take_room_of_the_main_head(path: Path) -> None:
    alone = small_plan(path)
    task = (
        "tasks.other={data_directory: x, global_batch_size: 64, head: {margin: {name: CosFace}, num_classes: 500000}}"
    )
    both = small_plan(path, task)
    assert both.local_batch_size == 2 * alone.local_batch_size
    assert alone.most_identities - both.most_identities > 500_000
    assert "Head other: 500,000 identities" in plan_table(both)
    with pytest.raises(ValueError, match=r"tasks.other.head.num_classes is null and there is no data in x/train"):
        small_plan(path, task.replace("500000", "null"))


def test_where_the_number_of_identities_comes_from(path: Path, tmp_path: Path) -> None:
    machine, overrides = Machine(1, GIB), ["head.num_classes=3000"]
    assert make_plan(load_config(path, overrides), machine, identities=2000).identities == {"main": 2000}
    assert make_plan(load_config(path, overrides), machine).identities == {"main": 3000}
    with pytest.raises(ValueError, match=r"no data in data/none/train.*; set --identities, or head.num_classes"):
        make_plan(load_config(path), machine)
    synthesize(tmp_path / "faces", identities=7, images_per_identity=2, image_size=16, seed=0)
    config = load_config(path, [f"data.directory={tmp_path / 'faces'}"])
    assert make_plan(config, machine).identities == {"main": 7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0", "--gpu-memory", "80GiB"], "--gpus is 0, but must be at least 1"),
        (["--gpus", "1", "--gpu-memory", "80"], "--gpu-memory is '80', but must be a positive number and one of"),
        (["--gpus", "1", "--gpu-memory", "1GB", "--tflops", "0"], "--tflops is 0.0, but must be positive and finite"),
        (["--gpus", "1", "--gpu-memory", "1GB", "--bandwidth", "inf"], "--bandwidth is inf, but must be positive"),
        (["--gpus", "1", "--gpu-memory", "1GB", "--identities", "0"], "--identities is 0, but must be at least 1"),
        (["--gpus", "1", "--gpu-memory", "1GB", "head.nothing=1"], "head.nothing: unknown key"),
        (
            ["--gpus", "6", "--gpu-memory", "1GB", "--gpus-per-node", "4"],
            "--gpus-per-node is 4, but must be at least 1",
        ),
    ],
)
def test_errors(path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["plan", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_mistyped_option_is_no_override(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", str(path), "--gpus", "1", "--gpu-memory", "1GB", "--nothing=1"])
    assert "unrecognized arguments: --nothing=1" in capsys.readouterr().err


def test_what_is_printed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus", "4", "--gpu-memory", "1GiB", "--identities", "100000"]
    assert main(["plan", str(path), "head.sample_rate=0.1", *options, "head.num_subcenters=2"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "Head main: 100,000 identities, D = 64, 2 sub-centers each",
        "stored for each class (counted)",
        "class centers (float32) 512 B",
        "together 1,024 B",
        "25,088 of them on a rank, 2,525 in play in a step of 64 rows",
        "head main: tables of 25,088 classes 24.50 MiB",
        "all-gather of embeddings [B, D] 16.00 KiB sent by a rank in a ring: 12.00 KiB",
    ):
        assert line in lines
    text = "\n".join(lines)
    assert "activations of 16 images (estimate)" in text
    assert "rates ASSUMED" in text
    assert "assumed: 989 TFLOP/s for 16-bit products, 67 for float32, 3350 GB/s of memory" in text
