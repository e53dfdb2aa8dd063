"""GPTQ: a smaller error of the product's output, nearest rounding without correlations, and degenerate inputs."""

import numpy as np
import pytest

from slm.core.manifest import Scheme
from slm.quantize.blocks import quantize_nearest, searched
from slm.quantize.descent import descended
from slm.quantize.gptq import _compensated, quantize_gptq
from slm.quantize.moments import InputMoments
from slm.quantize.rounding import restored

SCHEMES = [
    Scheme(bits=4, block_size=32, zero_points=True),
    Scheme(bits=4, block_size=64),
    Scheme(bits=8, block_size=32),
]
OUTPUTS, INPUTS = 48, 256  # more inputs than one group of columns


def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(OUTPUTS, INPUTS)).astype(np.float32)


def correlated(rows: int = 600, seed: int = 1) -> np.ndarray:
    """Returns activations with a few directions and a little noise, like those of a model."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(24, INPUTS)) * np.linspace(3, 0.3, 24)[:, None]
    return (rng.normal(size=(rows, 24)) @ directions + 0.3 * rng.normal(size=(rows, INPUTS))).astype(np.float32)


def output_error(x: np.ndarray, arrays: dict[str, np.ndarray], scheme: Scheme) -> float:
    return float(np.square(x @ (restored(arrays, scheme) - weight()).T).mean())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_less_error_than_nearest_on_correlated_inputs(scheme: Scheme) -> None:
    x = correlated()
    moments = x.T @ x
    made = quantize_gptq(weight(), InputMoments.of(moments), scheme)
    for search in (False, True):
        nearest = quantize_nearest(weight(), scheme, search, np.diagonal(moments))
        assert output_error(x, made, scheme) < 0.5 * output_error(x, nearest, scheme)
    # Negative control: moments of other inputs do not reduce the error.
    y = correlated(seed=3)[:, ::-1]
    other = quantize_gptq(weight(), InputMoments.of(y.T @ y), scheme)
    assert output_error(x, other, scheme) > 2 * output_error(x, made, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_without_correlations_no_block_is_worse_than_nearest(scheme: Scheme) -> None:
    power = np.random.default_rng(3).lognormal(size=INPUTS).astype(np.float32)
    moments = np.diag(power)
    forms = InputMoments.of(moments)
    made, nearest = quantize_gptq(weight(), forms, scheme), quantize_nearest(weight(), scheme, True, power)

    def block_errors(arrays: dict[str, np.ndarray]) -> np.ndarray:
        off = np.square(restored(arrays, scheme) - weight()) * np.diagonal(forms.damped)
        return off.reshape(OUTPUTS, -1, scheme.block_size).sum(axis=-1)

    assert made.keys() == nearest.keys()
    assert (block_errors(made) <= 1.0001 * block_errors(nearest)).all()
    moments[0, 1] = moments[1, 0] = 0.9 * np.sqrt(power[0] * power[1])  # negative control: two correlated channels
    changed = restored(quantize_gptq(weight(), InputMoments.of(moments), scheme), scheme) != restored(made, scheme)
    assert changed.any() and not changed[:, scheme.block_size :].any()


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(bits=4, block_size=64, half=True)], ids=lambda scheme: scheme.name)
def test_descent_lowers_the_error_of_gptq(scheme: Scheme) -> None:
    rows = correlated(900)
    x, unseen = rows[:600], rows[600:]
    forms = InputMoments.of(x.T @ x)
    shape = (OUTPUTS, INPUTS // scheme.block_size, scheme.block_size)
    grid = searched(weight().reshape(shape), scheme, forms.power.reshape(shape[1:]))
    integers = _compensated(weight(), grid, forms).reshape(shape)
    better, better_grid = descended(weight(), integers, grid, forms.damped, scheme)
    for inputs in (x, unseen):
        before, after = (
            np.square(inputs @ (values.reshape(OUTPUTS, INPUTS) - weight()).T).mean()
            for values in (grid.values(integers), better_grid.values(better))
        )
        assert after < 0.95 * before
    # Negative control: with moments of other inputs, the descent does not lower the error of these.
    y = correlated(seed=3)[:, ::-1]
    other, other_grid = descended(weight(), integers, grid, InputMoments.of(y.T @ y).damped, scheme)
    wrong = np.square(x @ (other_grid.values(other).reshape(OUTPUTS, INPUTS) - weight()).T).mean()
    assert wrong > np.square(x @ (grid.values(integers).reshape(OUTPUTS, INPUTS) - weight()).T).mean()


def test_a_block_of_zeros_keeps_its_scale() -> None:
    """Its scale is 0 or has no influence, and the equations for the scales would be singular."""
    scheme, values = SCHEMES[1], weight()
    values[:, : scheme.block_size] = 0
    x = correlated()
    found = restored(quantize_gptq(values, InputMoments.of(x.T @ x), scheme), scheme)
    assert np.isfinite(found).all() and not found[:, : scheme.block_size].any()


def test_same_input_same_integers() -> None:
    x = correlated()
    first, second = (quantize_gptq(weight(), InputMoments.of(x.T @ x), SCHEMES[0]) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_moments_that_have_no_inverse(rows: int) -> None:
    """Damping handles singular moments: fewer inputs than channels, channels that are always 0, and no inputs."""
    x = correlated(rows)
    x[:, 7] = 0
    for scheme in SCHEMES:
        made = quantize_gptq(weight(), InputMoments.of(x.T @ x), scheme)
        values = restored(made, scheme)
        assert np.isfinite(values).all()
        assert np.abs(values[:, 7] - weight()[:, 7]).max() < 1  # an unused channel is still rounded normally
        if rows:
            nearest = quantize_nearest(weight(), scheme, True, np.diagonal(x.T @ x))
            assert output_error(x, made, scheme) < output_error(x, nearest, scheme)


def test_a_channel_in_other_units_changes_nothing() -> None:
    """Only the ratios of the moments matter, not their scale."""
    x = correlated()
    moments = (x.T @ x).astype(np.float32)
    made, scaled = (
        quantize_gptq(weight(), InputMoments.of(moments * np.float32(factor)), SCHEMES[0]) for factor in (1, 2.0**-40)
    )
    for name, array in made.items():
        np.testing.assert_array_equal(array, scaled[name])
