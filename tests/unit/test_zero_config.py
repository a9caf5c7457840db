"""DeepSpeed's settings: those of the run, a user's file, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from engine_cases import Case
from support import SOON_SECONDS

from partialfc.distributed.mesh import ShardMesh
from partialfc.engine import EngineSettings
from partialfc.engine.zero_config import refusals_of_deepspeed, zero_config


def test_deepspeed_is_told_to_clip_as_the_run_does(tmp_path: Path) -> None:
    config = zero_config(EngineSettings(portions=4, zero_stage=3), num_parameters=100, device_type="cpu")
    assert config["gradient_clipping"] == 0.0
    assert config["gradient_accumulation_steps"] == 4
    assert config["zero_optimization"]["stage"] == 3
    path = tmp_path / "zero.json"
    given = {
        "gradient_clipping": 5.0,
        "wall_clock_breakdown": True,
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 7},
    }
    path.write_text(json.dumps(given), encoding="utf-8")
    config = zero_config(
        EngineSettings(max_gradient_norm=5.0, deepspeed_json=path), num_parameters=100, device_type="cpu"
    )
    assert config["wall_clock_breakdown"] is True
    assert config["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 7,
        "allgather_bucket_size": 100,
        "overlap_comm": True,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"gradient_clipping": 1.0}', "sets gradient_clipping to 1.0, but that is for max_gradient_norm to say"),
        ('{"train_batch_size": 64}', "sets train_batch_size to 64, but that is for the batch of the run"),
        ('{"bf16": {"enabled": true}}', 'sets bf16 to {"enabled": true}, but that is for the precision of the run'),
        ('{"optimizer": {"type": "Adam"}}', "but that is for the optimizer of the run to say; take it out"),
        ('{"zero_optimization": {"stage": 1}}', "sets zero_optimization.stage to 1, but that is for zero_stage"),
        ('{"zero_optimization": 2}', "sets zero_optimization to 2, but must be an object"),
        ("[1]", "has a list, but must be an object"),
        ("{", "is not JSON"),
        ('{"wall_clock_breakdown": NaN}', "NaN is no number of JSON"),
        ('{"dump_state": true, "dump_state": false}', "the key 'dump_state' comes twice"),
        ('{"curriculum_learning": {}}', "sets curriculum_learning, but allowed are comms_logger"),
        (
            '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}',
            "sets zero_optimization.offload_optimizer, which needs DeepSpeed's own optimizers",
        ),
        *(
            (
                f'{{"zero_optimization": {{"{key}": true}}}}',
                f"sets zero_optimization.{key}, which needs DeepSpeed's own",
            )
            for key in ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory")
        ),
        ('{"zero_optimization": {"zenflow": {}}}', "sets zero_optimization.zenflow, which needs DeepSpeed's own"),
        (
            '{"zero_optimization": {"mics_shard_size": 2}}',
            "sets zero_optimization.mics_shard_size, which shards as MiCS does, and this engine cannot; take it out",
        ),
        (
            '{"zero_optimization": {"legacy_stage1": true}}',
            "sets zero_optimization.legacy_stage1, which DeepSpeed no longer has; take it out",
        ),
        *(
            (f'{{"zero_optimization": {{"{key}": true}}}}', f"sets zero_optimization.{key}, which needs CUDA, but the")
            for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
        ),
        ('{"zero_optimization": {"leaf_module": 3}}', "sets zero_optimization.leaf_module to 3, but must be an object"),
        ('{"steps_per_print": 0}', "sets steps_per_print to 0, but must be a positive integer$"),
        ('{"steps_per_print": "x"}', 'sets steps_per_print to "x", but must be a positive integer$'),
        ('{"steps_per_print": true}', "sets steps_per_print to true, but must be a positive integer$"),
        ('{"flops_profiler": 3}', "sets flops_profiler to 3, but must be an object$"),
        ('{"flops_profiler": {"enabled": "x"}}', 'sets flops_profiler.enabled to "x", but must be true or false$'),
        (
            '{"flops_profiler": {"profile_step": "x"}}',
            'sets flops_profiler.profile_step to "x", but must be a positive',
        ),
        ('{"flops_profiler": {"bogus": 1}}', "sets flops_profiler.bogus, but allowed are detailed, enabled, module"),
        ('{"comms_logger": [1]}', r"sets comms_logger to \[1\], but must be an object$"),
        ('{"comms_logger": {"bogus": 1}}', "sets comms_logger.bogus, but allowed are debug, enabled, prof_all"),
        ('{"communication_data_type": 3}', "sets communication_data_type to 3, but must be fp16, bf16, fp32 or null$"),
        ('{"wall_clock_breakdown": "x"}', 'sets wall_clock_breakdown to "x", but must be true or false$'),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_contradicts_the_run_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "zero.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as raised:
        zero_config(EngineSettings(deepspeed_json=path), num_parameters=10, device_type="cpu")
    assert str(path) in str(raised.value)


REFUSED_BY_DEEPSPEED = {
    '{"zero_optimization": {"bogus": 1}}': (
        "sets zero_optimization.bogus, but DeepSpeed knows no such key; take it out of the file"
    ),
    '{"zero_optimization": {"reduce_bucket_size": "abc", "overlap_comm": 7}}': (
        'sets zero_optimization.reduce_bucket_size to "abc", but must be a valid integer, unable to parse string as an '
        "integer; zero_optimization.overlap_comm to 7, but must be a valid boolean, unable to interpret input"
    ),
    '{"zero_optimization": {"leaf_module": {"names": 3}}}': (
        "sets zero_optimization.leaf_module.names to 3, but must be a valid list"
    ),
    '{"zero_optimization": {"zeropp_loco_param": {}}}': (
        "is given, and DeepSpeed cannot be set up: LoCo-Zero++ has been removed; "
        "'zero_optimization.zeropp_loco_param' is no longer supported."
    ),
}


def _refusals(paths: list[Path], results: Any) -> None:
    for path in paths:
        try:
            Case("zero2", settings={"deepspeed_json": path}).build(ShardMesh.single())
            results.put((None, "accepted"))
        except Exception as error:
            results.put((type(error), str(error)))


def test_what_needs_cuda_is_passed_on_there(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"zero_quantized_weights": true}}', encoding="utf-8")
    settings = EngineSettings(zero_stage=3, deepspeed_json=path)
    config = zero_config(settings, num_parameters=10, device_type="cuda")
    assert config["zero_optimization"]["zero_quantized_weights"] is True


def test_what_a_file_of_others_has_without_using_it_is_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"steps_per_print": 1e5, "zero_optimization": {"cpu_offload": false, "mics_shard_size": -1}}')
    config = zero_config(EngineSettings(deepspeed_json=path), num_parameters=10, device_type="cpu")
    assert config["steps_per_print"] == 100_000
    assert config["zero_optimization"]["cpu_offload"] is False


def test_what_deepspeed_itself_refuses_names_file_and_key(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.json" for number in range(len(REFUSED_BY_DEEPSPEED))]
    for path, text in zip(paths, REFUSED_BY_DEEPSPEED, strict=True):
        path.write_text(text, encoding="utf-8")
    context = multiprocessing.get_context("spawn")  # its process group would stay behind in this one
    results = context.Queue()
    process = context.Process(target=_refusals, args=(paths, results))
    process.start()
    try:
        found = [results.get(timeout=SOON_SECONDS) for _ in paths]
        process.join(SOON_SECONDS)
        assert process.exitcode == 0
    finally:
        process.kill()
    for path, (kind, message), expected in zip(paths, found, REFUSED_BY_DEEPSPEED.values(), strict=True):
        assert kind is ValueError
        assert message.startswith(f"deepspeed_json {path} {expected}"), message
        assert "pydantic" not in message


def test_without_a_file_no_file_is_blamed() -> None:
    with pytest.raises(ValueError, match=r"^our own$"), refusals_of_deepspeed(None):
        raise ValueError("our own")
