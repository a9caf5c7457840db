"""The Triton versions compile for a GPU, which needs none: the interpreter takes what the compiler does not."""

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from partialfc.kernels import _triton_blockwise as blockwise
from partialfc.kernels import _triton_exponentials as exponentials
from partialfc.kernels import _triton_rounding as rounding
from partialfc.kernels import _triton_second_pass as second_pass
from partialfc.kernels import _triton_unit_rows as unit_rows

# Of a thread block on the GPUs of compute capability 9.0.
SHARED_BYTES = 227 * 1024

QUANTIZE = "codes_ptr:*i8 scales_ptr:*fp32 values_ptr:*fp32 keys_ptr:*i64 D:i32 S:i32"
DEQUANTIZE = "out_ptr:*fp32 codes_ptr:*i8 scales_ptr:*fp32 D:i32 S:i32"
EXPONENTIALS = (
    "logits_ptr:*fp32 out_ptr:*bf16 sums_ptr:*fp32 shift_ptr:*fp32 columns_ptr:*i64 log_weight_ptr:*fp32 "
    "factor_ptr:*fp32 c:i32"
)
SECOND_PASS = (
    "table_ptr:*{0} momentum_ptr:*{1} rows_ptr:*i64 keys_ptr:*i64 momentum_keys_ptr:*i64 operand_ptr:*{2} "
    "shift_ptr:*fp32 factor_ptr:*fp32 own_column_ptr:*i64 own_ptr:*fp32 steps_ptr:*i1 learning_rate:fp32 "
    "momentum:fp32 weight_decay:fp32 c:i32 V:i32 D:i32"
)


@pytest.fixture(autouse=True)
def _compiles_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def shared_bytes(kernel, signature, options=None, **constants):
    """Compiles, and says how much shared memory a program needs."""
    types = dict(part.split(":") for part in signature.split()) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options or {}).metadata.shared


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rounding(dtype):
    signature = f"out_ptr:*{dtype} values_ptr:*fp32 keys_ptr:*i64 D:i32"
    assert shared_bytes(rounding._round_kernel, signature, BLOCK=512) <= SHARED_BYTES


def test_blockwise():
    assert shared_bytes(blockwise._quantize_kernel, QUANTIZE, BLOCKS=8) <= SHARED_BYTES
    assert shared_bytes(blockwise._dequantize_kernel, DEQUANTIZE, BLOCKS=8) <= SHARED_BYTES


def test_exponentials():
    constants = {"P": 2, "WEIGHTED": True, "SCALED": True, "BLOCK": 1024}
    assert shared_bytes(exponentials._exponentials_kernel, EXPONENTIALS, **constants) <= SHARED_BYTES


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_unit_rows(dtype):
    signature = f"unit_ptr:*bf16 inverse_norm_ptr:*fp32 table_ptr:*{dtype} rows_ptr:*i64 c:i32 D:i32"
    assert shared_bytes(unit_rows._unit_rows_kernel, signature, BLOCK_C=4, BLOCK_D=512) <= SHARED_BYTES


@pytest.mark.parametrize(
    ("dtypes", "block_D"),
    [(("fp16", "bf16", "bf16"), 512), (("fp32", "fp32", "fp32"), 1024), (("fp16", "fp16", "bf16"), 16)],
)
def test_second_pass(dtypes, block_D):
    options = {"num_warps": second_pass.NUM_WARPS, "num_stages": second_pass.NUM_STAGES}
    constants = {"BLOCK_C": second_pass.BLOCK_C, "BLOCK_V": second_pass.BLOCK_V, "BLOCK_D": block_D}
    constants |= {"HAS_MOMENTUM": True, "WIDEN": False}
    signature = SECOND_PASS.format(*dtypes)
    assert shared_bytes(second_pass._second_pass_kernel, signature, options, **constants) <= SHARED_BYTES
