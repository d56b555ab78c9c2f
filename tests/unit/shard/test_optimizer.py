"""The shard's optimizers are torch's, step for step."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.adagrad import adagrad
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from membank.bank_service.shard import optimizer
from membank.bank_service.shard.content import content_crcs, initial_content, zero_state
from membank.bank_service.shard.optimizer import (
    BlockOptimizer,
    BlockStep,
    as_array,
    as_tensor,
    convert,
)
from membank.wire.loaders import Loaders
from membank.wire.spec import Array, BankSpec, BlockRef, OptimizerKind, OptimizerSpec, Role
from tiny_bank import gradient_for, tiny_spec

REF = BlockRef(1, 1)
SPECS = {
    "adamw": OptimizerSpec(kind=OptimizerKind.ADAMW, weight_decay=0.1),
    "adagrad": OptimizerSpec(kind=OptimizerKind.ADAGRAD, eps=1e-6, weight_decay=0.01),
    "sgd": OptimizerSpec(kind=OptimizerKind.SGD, beta1=0.0, weight_decay=0.01),
    "momentum": OptimizerSpec(kind=OptimizerKind.SGD, beta1=0.9),
}


def _assert_close(found: Array, expected: object) -> None:
    np.testing.assert_allclose(
        found.astype(np.float32), np.asarray(expected, np.float32), rtol=1e-5, atol=1e-7
    )


def _spec(name: str, dtype: str = "float32") -> BankSpec:
    base = tiny_spec(dtype=dtype)
    return BankSpec(
        name="x",
        num_layers=base.num_layers,
        width=base.width,
        levels=base.levels,
        dtype=dtype,
        optimizer=SPECS[name],
    )


def _start(spec: BankSpec) -> dict[Role, Array]:
    return {**initial_content(spec, REF).arrays, **zero_state(spec, REF)}


def _torch_optimizer(spec: BankSpec, weight: torch.nn.Parameter) -> torch.optim.Optimizer:
    rate, own = spec.levels[0].learning_rate, spec.optimizer
    match own.kind:
        case OptimizerKind.ADAMW:
            return torch.optim.AdamW(
                [weight], rate, (own.beta1, own.beta2), own.eps, own.weight_decay
            )
        case OptimizerKind.ADAGRAD:
            return torch.optim.Adagrad([weight], rate, weight_decay=own.weight_decay, eps=own.eps)
        case OptimizerKind.SGD:
            return torch.optim.SGD(
                [weight], rate, momentum=own.beta1, weight_decay=own.weight_decay
            )


@pytest.mark.parametrize("name", SPECS)
def test_ten_steps_are_those_of_torch(name: str) -> None:
    spec = _spec(name)
    content = _start(spec)
    parameter = torch.nn.Parameter(torch.from_numpy(content[Role.WEIGHT].copy()))
    reference = _torch_optimizer(spec, parameter)
    applier = BlockOptimizer(spec)
    for step in range(10):
        gradient = gradient_for(spec, REF, step)
        after = applier.apply(1, content, step, gradient, 1.0)
        assert after is not None
        content = after
        parameter.grad = torch.from_numpy(gradient.copy())
        reference.step()
        _assert_close(content[Role.WEIGHT], parameter.detach().numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_updated_in_float32_and_rounded_once(dtype: str) -> None:
    spec = _spec("adamw", dtype)
    content = _start(spec)
    gradient = gradient_for(spec, REF, 1)
    after = BlockOptimizer(spec).apply(1, content, 0, gradient, 1.0)
    assert after is not None
    parameter = torch.nn.Parameter(torch.from_numpy(content[Role.WEIGHT].astype(np.float32)))
    parameter.grad = torch.from_numpy(gradient.copy())
    _torch_optimizer(spec, parameter).step()
    expected = parameter.detach().to(getattr(torch, dtype))
    assert torch.equal(as_tensor(after[Role.WEIGHT]), expected)
    assert after[Role.EXP_AVG].dtype == np.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_gradients_are_widened(dtype: str) -> None:
    spec = _spec("adamw")
    narrow = gradient_for(spec, REF, 3, dtype)
    one = BlockOptimizer(spec).apply(1, _start(spec), 0, narrow, 1.0)
    two = BlockOptimizer(spec).apply(1, _start(spec), 0, narrow.astype(np.float32), 1.0)
    assert one is not None
    assert two is not None
    np.testing.assert_array_equal(one[Role.WEIGHT], two[Role.WEIGHT])


def test_the_scale_multiplies_the_rate() -> None:
    spec = _spec("sgd")
    content, gradient = _start(spec), gradient_for(spec, REF, 4)
    applier = BlockOptimizer(spec)
    still = applier.apply(1, content, 0, gradient, 0.0)
    half = applier.apply(1, content, 0, gradient, 0.5)
    assert still is not None
    assert half is not None
    np.testing.assert_array_equal(still[Role.WEIGHT], content[Role.WEIGHT])
    weight = content[Role.WEIGHT].astype(np.float32)
    expected = weight - 0.05 * (gradient.astype(np.float32) + 0.01 * weight)
    _assert_close(half[Role.WEIGHT], expected)


def test_the_present_content_is_not_touched() -> None:
    spec = _spec("adamw")
    content = _start(spec)
    before = content_crcs(spec, content)
    after = BlockOptimizer(spec).apply(1, content, 0, gradient_for(spec, REF, 5), 1.0)
    assert after is not None
    assert content_crcs(spec, content) == before
    for role, array in after.items():
        assert not np.shares_memory(array, content[role])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_refused(name: str, value: float) -> None:
    spec = _spec(name)
    gradient = gradient_for(spec, REF, 6)
    gradient[0, 0, 0, 0] = value
    assert BlockOptimizer(spec).apply(1, _start(spec), 0, gradient, 1.0) is None
    # A learning rate of zero must not hide it from the weight alone.
    assert BlockOptimizer(spec).apply(1, _start(spec), 0, gradient, 0.0) is None


def test_overflow_of_the_state_is_refused() -> None:
    spec = _spec("adamw")
    gradient = np.full(spec.block_shape(1), 1e30, np.float32)
    assert BlockOptimizer(spec).apply(1, _start(spec), 0, gradient, 1.0) is None


@pytest.mark.parametrize("name", SPECS)
def test_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    spec = BankSpec(
        name="odd",
        num_layers=3,
        width=1023,
        levels=(tiny_spec().levels[0],),
        optimizer=SPECS[name],
    )
    ref = BlockRef(1, 0)
    content = {**initial_content(spec, ref).arrays, **zero_state(spec, ref)}
    results: list[Array] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            after = BlockOptimizer(spec).apply(1, content, 3, gradient_for(spec, ref, 1), 1.0)
            assert after is not None
            results.append(after[Role.WEIGHT])
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_views_between_numpy_and_torch_keep_the_bits(name: str) -> None:
    array = gradient_for(tiny_spec(), REF, 1, name)
    array.flags.writeable = False
    back = as_array(as_tensor(array), array.dtype)
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


def test_convert_rounds_to_nearest_even_as_numpy_does() -> None:
    array = gradient_for(tiny_spec(), REF, 2)
    for name in ("bfloat16", "float16"):
        dtype = np.dtype(name)
        assert convert(array, dtype).tobytes() == array.astype(dtype).tobytes()
    assert convert(array, array.dtype) is array


def _whole(spec: BankSpec, before: dict[Role, Array], step: int, gradient: Array) -> list[bytes]:
    """Return the bytes of what torch's own optimizer makes of all elements at once."""
    own, rate = spec.optimizer, spec.levels[0].learning_rate
    weight, *state = [
        torch.from_numpy(before[role].astype(np.float32).reshape(-1)) for role in spec.roles
    ]
    wide = torch.from_numpy(gradient.astype(np.float32).reshape(-1))
    steps = [torch.tensor(float(step))]
    match own.kind:
        case OptimizerKind.ADAMW:
            adamw(
                [weight], [wide], [state[0]], [state[1]], [], steps,
                fused=True, amsgrad=False, beta1=own.beta1, beta2=own.beta2,
                lr=rate, weight_decay=own.weight_decay, eps=own.eps, maximize=False,
            )  # fmt: skip
        case OptimizerKind.ADAGRAD:
            adagrad(
                [weight], [wide], [state[0]], steps,
                fused=True, lr=rate, weight_decay=own.weight_decay, lr_decay=0.0,
                eps=own.eps, maximize=False,
            )  # fmt: skip
        case OptimizerKind.SGD:
            sgd(
                [weight], [wide], [state[0] if state else None],
                fused=True, weight_decay=own.weight_decay, momentum=own.beta1, lr=rate,
                dampening=0.0, nesterov=False, maximize=False,
            )  # fmt: skip
    arrays = [weight.numpy().astype(spec.numpy_dtype), *(tensor.numpy() for tensor in state)]
    return [array.tobytes() for array in arrays]


def _random_block(spec: BankSpec, count: int, seed: int) -> dict[Role, Array]:
    rng = np.random.default_rng(seed)
    return {
        role: np.abs(rng.standard_normal((1, 1, 1, count), np.float32)).astype(
            spec.role_dtype(role)
        )
        for role in spec.roles
    }


def _stepped(
    spec: BankSpec, before: dict[Role, Array], step: int, gradient: Array, threads: int
) -> BlockStep:
    block = BlockOptimizer(spec).begin(1, before, step, gradient, 1.0)
    tiles = list(range(block.num_tiles))
    if threads == 1:
        for tile in reversed(tiles):
            block.run(tile)
    else:
        Loaders(threads).map(block.run, tiles)
    return block


@given(
    name=st.sampled_from(list(SPECS)),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    gradient_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    count=st.integers(1, 700),
    vectors=st.integers(1, 12),
    step=st.sampled_from([0, 1, 1000, 1 << 24]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_tiles_yield_the_bits_of_the_whole(
    name: str,
    dtype: str,
    gradient_dtype: str,
    count: int,
    vectors: int,
    step: int,
    threads: int,
    seed: int,
) -> None:
    spec = _spec(name, dtype)
    before = _random_block(spec, count, seed)
    gradient = np.random.default_rng(seed).standard_normal((1, 1, 1, count), np.float32)
    gradient = gradient.astype(np.dtype(gradient_dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "TILE", 16 * vectors)
        block = _stepped(spec, before, step, gradient, threads)
        assert block.is_finite
        assert block.num_tiles == -(-count // (16 * vectors))
        assert block.crcs() == content_crcs(spec, block.arrays)
    found = [block.arrays[role].tobytes() for role in spec.roles]
    assert found == _whole(spec, before, step, gradient)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("extra", [-1, 0, 37])
def test_a_block_of_several_tiles_has_the_bits_of_the_whole(
    name: str, dtype: str, extra: int
) -> None:
    spec = _spec(name, dtype)
    count = 2 * optimizer.TILE + extra
    before = _random_block(spec, count, 7)
    gradient = np.random.default_rng(8).standard_normal((1, 1, 1, count), np.float32)
    block = _stepped(spec, before, 3, gradient, 2)
    assert block.crcs() == content_crcs(spec, block.arrays)
    found = [block.arrays[role].tobytes() for role in spec.roles]
    assert found == _whole(spec, before, 3, gradient)


@pytest.mark.parametrize("position", [0, optimizer.TILE, 2 * optimizer.TILE + 36])
def test_what_is_not_finite_is_found_in_every_tile(position: int) -> None:
    spec = _spec("adamw")
    before = _random_block(spec, 2 * optimizer.TILE + 37, 7)
    gradient = np.zeros_like(before[Role.WEIGHT])
    gradient[..., position] = np.nan
    assert not _stepped(spec, before, 3, gradient, 2).is_finite


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_sum_that_overflows_is_no_sign_of_numbers_that_do(dtype: str) -> None:
    spec = _spec("sgd", dtype)
    largest = float(np.finfo(dtype).max)
    before = {Role.WEIGHT: np.full((1, 1, 1, 64), largest / 2, dtype)}
    gradient = np.zeros((1, 1, 1, 64), np.float32)
    assert BlockOptimizer(spec).apply(1, before, 0, gradient, 1.0) is not None
    before[Role.WEIGHT][..., 5] = np.inf
    assert BlockOptimizer(spec).apply(1, before, 0, gradient, 1.0) is None


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_what_a_program_makes_the_default_of_torch_changes_no_bit(default: torch.dtype) -> None:
    spec = _spec("adamw", "bfloat16")
    before = _random_block(spec, 64, 7)
    gradient = np.full((1, 1, 1, 64), 0.5, before[Role.WEIGHT].dtype)
    # A count that bfloat16 would round.
    expected = BlockOptimizer(spec).apply(1, before, 260, gradient, 1.0)
    optimizer._after_steps.cache_clear()
    torch.set_default_dtype(default)
    try:
        # A thread that has no scratch memory yet.
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(BlockOptimizer(spec).apply, 1, before, 260, gradient, 1.0).result()
    finally:
        torch.set_default_dtype(torch.float32)
    assert expected is not None
    assert found is not None
    for role in spec.roles:
        assert found[role].tobytes() == expected[role].tobytes()
