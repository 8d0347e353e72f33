"""Perturbations: what all of them promise, then each one against its definition."""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch._subclasses.fake_tensor import FakeTensorMode

from cet import perturb as P
from thinned import slow

WINDOW, WAVE, STEREO, SPECTROGRAM, IMAGE = (6, 40), (400,), (2, 200), (20, 30), (3, 16, 12)
LEAVES = [
    (P.Jitter(), WINDOW),
    (P.Jitter(0.1, relative=False), IMAGE),
    (P.Scaling(), WINDOW),
    (P.AxisRotation(), WINDOW),
    (P.AxisRotation(triples=(1,)), (5, 40)),
    (P.Drift(), WINDOW),
    (P.TimeMask(0.6, spans=2), WINDOW),
    (P.ChannelDropout(0.5), WINDOW),
    (P.TimeWarp(), WINDOW),
    (P.Noise(), WAVE),
    (P.Noise(), STEREO),
    (P.Gain(), WAVE),
    (P.TimeShift(), STEREO),
    (P.SpecMask(), SPECTROGRAM),
    (P.SpecMask(fill=0.0), (2, *SPECTROGRAM)),
    (P.Crop(), IMAGE),
    (P.Crop(padding_mode="zeros"), IMAGE),
    (P.Flip(), IMAGE),
    (P.ColorJitter(), IMAGE),
    (P.Erase(), IMAGE),
]
CASES = [
    *LEAVES,
    (P.RandomApply(P.Jitter(), 0.5), WINDOW),
    (P.RandomChoice(P.Jitter(), P.Scaling(), P.TimeWarp()), WINDOW),
    (P.sensor(), WINDOW),
    (P.sensor(rotate=False), (1, 40)),
    (P.audio_waveform(), WAVE),
    (P.audio_spectrogram(), SPECTROGRAM),
    (P.image(), IMAGE),
]


def name(value):
    return type(value).__name__ if isinstance(value, P.Perturbation) else str(value)


every_leaf = pytest.mark.parametrize(("perturb", "shape"), LEAVES, ids=name)
every_case = pytest.mark.parametrize(("perturb", "shape"), CASES, ids=name)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(rows, shape, dtype=torch.float32):
    return torch.randn(rows, *shape, generator=seeded(1), dtype=torch.float64).to(dtype)


def runs(mask):
    """Number of contiguous runs of True in each row of (B, n)."""
    return (mask & ~F.pad(mask, (1, 0))[:, :-1]).sum(1)


# What every perturbation promises


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_values_change_but_not_the_input_nor_shape_dtype_device(perturb, shape, dtype):
    x = batch(16, shape, dtype)
    before = x.clone()
    y = perturb(x, generator=seeded())
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    assert y.isfinite().all()
    assert not torch.equal(y, x)
    assert torch.equal(x, before)


@every_leaf
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_float32_rounded_once(perturb, shape, dtype):
    x = batch(8, shape, dtype)
    expected = perturb(x.float(), generator=seeded()).to(dtype)
    assert torch.equal(perturb(x, generator=seeded()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(perturb(x, generator=seeded()), expected)


@every_case
def test_severity_zero_is_the_identity_bit_for_bit_in_new_storage(perturb, shape):
    x = batch(4, shape)
    x.view(4, -1)[:, :4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    y = perturb.with_severity(0)(x, generator=seeded())
    assert torch.equal(y.view(torch.int32), x.view(torch.int32))  # bits: NaN and -0.0 count
    assert y.data_ptr() != x.data_ptr()


@every_case
def test_the_same_seed_gives_the_same_output(perturb, shape):
    x = batch(16, shape)
    y = perturb(x, generator=seeded(3))
    assert torch.equal(y, perturb(x, generator=seeded(3)))
    assert not torch.equal(y, perturb(x, generator=seeded(4)))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert torch.equal(y, perturb(x))


@every_case
def test_equal_rows_are_perturbed_differently(perturb, shape):
    y = perturb(batch(1, shape).expand(32, *shape), generator=seeded())
    assert len(y.unique(dim=0)) > 1


@every_case
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_a_row_never_touches_another(perturb, shape, poison):
    x = batch(6, shape)
    poisoned = x.clone()
    poisoned[2] = poison
    y, z = perturb(x, generator=seeded()), perturb(poisoned, generator=seeded())
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[others], z[others])


@every_case
@pytest.mark.parametrize("rows", [0, 1])
def test_smallest_batches(perturb, shape, rows):
    y = perturb(batch(rows, shape), generator=seeded())
    assert y.shape == (rows, *shape)
    assert y.isfinite().all()


@every_case
def test_strength_grows_with_severity(perturb, shape):
    x = batch(64, shape).cumsum(-1)
    distances = [
        (perturb.with_severity(severity)(x, generator=seeded()) - x).abs().mean() for severity in (0.25, 0.5, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] < distances[-1]


@every_case
def test_everything_happens_on_the_device_of_x_without_a_host_sync(perturb, shape):
    """Fake tensors refuse mixed devices and values the host would wait for; x is off the default device."""
    with FakeTensorMode(), torch.device("cuda"):
        y = perturb(torch.empty(8, *shape, device="cpu", dtype=torch.float16))
    assert (y.shape, y.dtype, y.device.type) == ((8, *shape), torch.float16, "cpu")


# Missing values: NaN, or any other value that is not finite

MOVES = P.TimeWarp, P.TimeShift, P.Crop, P.Flip
"""Perturbations that move values; with all others a value stays at its place."""


def with_missing(x, missing=math.nan, fraction=0.01):
    """x (B, ...) without a few values, whole first channels in rows 1 and 2, all of row 3, and nothing in row 0."""
    gone = torch.rand(x.shape, generator=seeded(2), dtype=torch.float64) < fraction
    gone[4, ..., 5] = True
    gone[1:3, :1] = True
    gone[3] = True
    gone[0] = False
    return x.masked_fill(gone, missing), gone


@every_leaf
@pytest.mark.parametrize("severity", [0.3, slow(1.0), 4.0])
@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, slow(torch.float64)], ids=str)
def test_a_missing_value_stays_missing_and_nothing_else_becomes_so(perturb, shape, severity, missing, dtype):
    perturb = perturb.with_severity(severity)
    x, gone = with_missing(batch(12, shape, dtype), missing)
    y = perturb(x, generator=seeded())
    if isinstance(perturb, MOVES):  # a position is missing where the value nearest to what is moved there is
        gone = perturb(gone.to(torch.promote_types(dtype, torch.float32)), generator=seeded()) > 0.5
    assert torch.equal(~y.isfinite(), gone)
    assert torch.equal(y[gone].isnan(), torch.full_like(y[gone], missing).isnan())


@every_case
def test_few_missing_values_stay_few(perturb, shape):
    x = batch(64, shape)
    x = x.masked_fill(torch.rand(x.shape, generator=seeded(2)) < 0.01, math.nan)
    x[::2] = batch(32, shape)
    y = perturb(x, generator=seeded())
    assert y[::2].isfinite().all()
    assert 0 < y.isnan().float().mean() < 1.5 * x.isnan().float().mean()
    assert not y.isinf().any()


@every_leaf
def test_gradients_are_finite_where_values_are_missing(perturb, shape):
    x, _ = with_missing(batch(8, shape))
    x.requires_grad_()
    y = perturb(x, generator=seeded())
    torch.where(y.isfinite(), y, 0.0).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("drawn", [P.Jitter(1.0), P.Drift(1.0)], ids=name)
def test_noise_is_in_units_of_the_values_that_are_there(drawn):
    x, gone = with_missing(
        batch(12, WINDOW, torch.float64) * torch.rand(12, 6, 1, generator=seeded()).double(), fraction=0.2
    )
    y = drawn(x, generator=seeded())
    unit = torch.randn(12, 6, 40, generator=seeded(5), dtype=torch.float64)
    unit = (unit - unit.mean(2, keepdim=True)) / unit.std(2, correction=0, keepdim=True)
    per_std = drawn(unit, generator=seeded()) - unit
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        std = np.nanstd(x.numpy(), axis=2, keepdims=True)
    expected = torch.from_numpy(x.numpy() + per_std.numpy() * std)
    torch.testing.assert_close(y[~gone], expected[~gone])


def test_noise_has_exactly_the_given_snr_over_the_values_that_are_there():
    x, gone = with_missing(batch(12, STEREO, torch.float64), fraction=0.2)
    noise = (P.Noise(13.0)(x, generator=seeded()) - x).masked_fill(gone, 0.0)
    power, power_of_noise = (v.masked_fill(gone, 0.0).square().sum((1, 2))[[0, 1, 2, 4, 5]] for v in (x, noise))
    torch.testing.assert_close(10 * torch.log10(power / power_of_noise), torch.full((5,), 13.0, dtype=torch.float64))


def test_masks_fill_with_the_mean_of_the_values_that_are_there():
    x, gone = with_missing(batch(12, WINDOW), fraction=0.3)
    y = P.TimeMask(1.0)(x, generator=seeded())
    changed = (y != x) & ~gone
    assert changed.any()
    torch.testing.assert_close(y[changed], x.nanmean(2, keepdim=True).expand_as(x)[changed])


def test_a_rotation_takes_the_mean_for_a_missing_axis():
    x, gone = with_missing(batch(12, (3, 40), torch.float64), fraction=0.2)
    y = P.AxisRotation(90.0)(x, generator=seeded())
    filled = torch.where(gone, x.nanmean(2, keepdim=True).nan_to_num(), x)
    expected = P.AxisRotation(90.0)(filled, generator=seeded())
    torch.testing.assert_close(y[~gone], expected[~gone])


def test_colors_stretch_about_the_mean_of_the_pixels_that_are_there():
    x, gone = with_missing(batch(12, IMAGE, torch.float64), fraction=0.2)
    contrast, saturation = P.ColorJitter(0, 0.9, 0), P.ColorJitter(0, 0, 0.9)
    ones = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(12, 3, 16, 6)  # of which 1 turns into (1 + factor) / 2
    factor = 2 * contrast(ones, generator=seeded())[..., 1:2] - 1
    mean = x.nanmean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(contrast(x, generator=seeded())[~gone], torch.lerp(mean, x, factor)[~gone])
    ones = torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64).view(3, 1, 1).repeat(12, 1, 16, 12)  # grey is 1
    factor = (saturation(ones, generator=seeded())[:, 1:2] - 1) / 2
    grey = x.nanmean(1, keepdim=True)
    torch.testing.assert_close(saturation(x, generator=seeded())[~gone], torch.lerp(grey, x, factor)[~gone])


def test_a_warp_between_a_value_and_a_missing_one_takes_the_value():
    x = torch.tensor([1.0, math.nan, 5.0, 7.0, math.nan, 11.0]).repeat(64, 2, 1)
    y = P.TimeWarp(0.5)(x, generator=seeded())
    position = P.TimeWarp(0.5)(torch.arange(6.0).repeat(64, 2, 1), generator=seeded())
    nearest = (position + 0.5).floor().long()
    assert torch.equal(y.isnan(), x.gather(2, nearest).isnan())
    beside = (position > 1.5) & (position < 2) | (position > 4.5)
    assert torch.equal(y[beside], x.gather(2, nearest)[beside])


@every_case
def test_gradients_are_finite_for_flat_and_for_silent_input(perturb, shape):
    for level in (0.0, 1.0):
        x = torch.full((4, *shape), level, requires_grad=True)
        perturb(x, generator=seeded()).sum().backward()
        assert x.grad.isfinite().all()
        assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("perturb", "shape"),
    [
        (P.AxisRotation(), (3, 5)),
        (P.TimeWarp(), (2, 7)),
        (P.ColorJitter(), (3, 2, 3)),
        (P.TimeMask(0.9), (2, 7)),
    ],
    ids=name,
)
def test_gradients_are_those_of_the_output(perturb, shape):
    x = batch(2, shape, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: perturb(v, generator=seeded()), (x,))


@every_leaf
def test_single_samples_at_high_severity(perturb, shape):
    channels = shape[0] if len(shape) > 1 else 1
    x = batch(64, (channels, *(1 for _ in shape[1:])))
    y = perturb.with_severity(20.0)(x, generator=seeded())
    assert y.shape == x.shape
    assert y.isfinite().all()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_shape_and_severity(data):
    perturb = data.draw(st.sampled_from([leaf for leaf, _ in LEAVES]))
    rank = data.draw(st.sampled_from(perturb.layouts)).count(",") + 1
    sizes = [data.draw(st.integers(0, 4)), *(data.draw(st.integers(0, 9)) for _ in range(rank - 1))]
    if isinstance(perturb, P.AxisRotation):
        sizes[1] = 6
    x = batch(sizes[0], sizes[1:])
    y = perturb.with_severity(data.draw(st.floats(0, 20)))(x, generator=seeded())
    assert y.shape == x.shape
    assert y.isfinite().all()


# Sensors


@pytest.mark.parametrize("relative", [True, False])
def test_jitter_has_the_given_standard_deviation_and_is_linear_in_severity(relative):
    level = torch.tensor([1.0, 10.0, 100.0]).view(3, 1)
    x = batch(4, (3, 5000), torch.float64) * level
    noise = P.Jitter(0.2, relative=relative)(x, generator=seeded()) - x
    unit = x.std(-1) if relative else torch.ones(4, 3)
    torch.testing.assert_close(noise.std(-1) / unit, torch.full((4, 3), 0.2).double(), rtol=0.05, atol=0)
    double = P.Jitter(0.2, relative=relative, severity=2.0)(x, generator=seeded()) - x
    torch.testing.assert_close(double, 2 * noise)


def test_jitter_passes_gradients_unchanged():
    x = batch(2, WINDOW).requires_grad_()
    P.Jitter(0.5)(x, generator=seeded()).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_scaling_is_one_log_normal_gain_per_channel():
    x = batch(2000, (3, 4), torch.float64)
    gain = P.Scaling(0.3)(x, generator=seeded()) / x
    torch.testing.assert_close(gain, gain[..., :1].expand_as(gain))
    log_gain = gain[..., 0].log()
    assert log_gain.mean().abs() < 0.02
    assert abs(log_gain.std() - 0.3) < 0.02


def test_axis_rotation_is_one_bounded_rotation_for_all_triples():
    basis = torch.eye(3, dtype=torch.float64).repeat(2, 1).expand(500, 6, 3)
    first, second = P.AxisRotation(40.0, severity=0.5)(basis, generator=seeded()).split(3, dim=1)
    assert torch.equal(first, second)
    torch.testing.assert_close(first @ first.mT, torch.eye(3, dtype=torch.float64).expand(500, 3, 3))
    torch.testing.assert_close(torch.linalg.det(first), torch.ones(500, dtype=torch.float64))
    turns = Rotation.from_matrix(first.numpy())
    degrees = np.degrees(turns.magnitude())
    assert degrees.max() <= 20.0 + 1e-6
    assert degrees.max() > 19.0
    # Uniform axes: 500 rotation vectors cancel out, and no direction is favoured.
    spread = np.cov(turns.as_rotvec(degrees=True).T)
    assert np.abs(turns.mean().magnitude()) < math.radians(2.0)
    assert np.linalg.cond(spread) < 1.5


def test_axis_rotation_preserves_norms_and_spares_other_channels():
    x = batch(8, (8, 20), torch.float64)
    y = P.AxisRotation(180.0, triples=(5, 1))(x, generator=seeded())
    assert torch.equal(y[:, [0, 4]], x[:, [0, 4]])
    for start in (1, 5):
        axes = slice(start, start + 3)
        torch.testing.assert_close(y[:, axes].norm(dim=1), x[:, axes].norm(dim=1))
        assert not torch.equal(y[:, axes], x[:, axes])


def test_drift_is_piecewise_linear_in_units_of_the_channel():
    x = batch(400, (2, 61), torch.float64) * torch.tensor([1.0, 50.0]).view(2, 1)
    baseline = (P.Drift(0.5, knots=4)(x, generator=seeded()) - x) / x.std(-1, correction=0, keepdim=True)
    bends = baseline.diff(n=2).abs() > 1e-9
    assert set(bends.nonzero()[:, -1].tolist()) == {19, 39}  # knots at samples 0, 20, 40 and 60
    assert abs(baseline[..., [0, 20, 40, 60]].std() - 0.5) < 0.03


@pytest.mark.parametrize("spans", [1, 3])
def test_time_mask_spans_are_contiguous_and_bounded(spans):
    x = batch(4000, (2, 50))
    y = P.TimeMask(0.4, spans=spans, fill=7.0, severity=0.5)(x, generator=seeded())
    mask = (y == 7.0).all(1)
    assert torch.equal(y, x.masked_fill(mask.unsqueeze(1), 7.0))
    assert runs(mask).max() == spans
    assert mask.sum(1).max() <= 10 * spans
    assert mask.any(0).all()  # every sample can be hit
    if spans == 1:
        assert set(mask.sum(1).tolist()) == set(range(11))
        assert abs(mask.sum(1).float().mean() - 5.0) < 0.15  # no span is cut off at the end


def test_time_mask_fills_with_the_mean_of_the_channel():
    x = batch(50, (3, 20), torch.float64)
    y = P.TimeMask(1.0)(x, generator=seeded())
    torch.testing.assert_close(y[y != x], x.mean(-1, keepdim=True).expand_as(x)[y != x])


def test_channel_dropout_drops_whole_channels_but_never_all():
    x = batch(2000, (4, 3))
    perturb = P.ChannelDropout(0.25)
    y = perturb(x, generator=seeded())
    dropped = (y == 0).all(-1)
    assert torch.equal(y, x.masked_fill(dropped.unsqueeze(-1), 0.0))
    assert abs(dropped.float().mean() - 0.25) < 0.02
    survivors = (perturb.with_severity(100)(x, generator=seeded()) != 0).all(-1)
    assert torch.equal(survivors.sum(1), torch.ones(2000, dtype=torch.int64))


@pytest.mark.parametrize("severity", [0.1, 1.0, 5.0, 1e4])
def test_time_warp_is_monotone_keeps_its_ends_and_interpolates_linearly(severity):
    length = 60
    ramp = torch.arange(length, dtype=torch.float64).expand(32, 1, length)
    signal = batch(32, (1, length), torch.float64)
    position, warped = P.TimeWarp(severity=severity)(torch.cat([ramp, signal], 1), generator=seeded()).unbind(1)
    assert (position.diff() >= 0).all()
    assert torch.equal(position[:, [0, -1]], ramp[:, 0, [0, -1]])
    for row in range(32):
        expected = np.interp(position[row], np.arange(length), signal[row, 0])
        np.testing.assert_allclose(warped[row], expected, atol=1e-9)


# Audio


@pytest.mark.parametrize(("severity", "shape"), [(1.0, WAVE), (0.5, STEREO), (3.0, STEREO)])
def test_noise_has_exactly_the_given_snr(severity, shape):
    x = batch(5, shape, torch.float64) * torch.logspace(-3, 3, 5).view(5, *(1 for _ in shape))
    noise = P.Noise(12.0, severity=severity)(x, generator=seeded()) - x
    snr = 10 * torch.log10(x.square().flatten(1).mean(1) / noise.square().flatten(1).mean(1))
    torch.testing.assert_close(snr, torch.full_like(snr, 12.0 - 20 * math.log10(severity)))


def test_noise_leaves_silence_silent():
    assert torch.equal(P.Noise()(torch.zeros(2, 9), generator=seeded()), torch.zeros(2, 9))


@pytest.mark.parametrize("shape", [WAVE, STEREO], ids=str)
def test_gain_is_one_factor_per_row_within_its_decibels(shape):
    x = batch(200, shape, torch.float64)
    gain_db = 20 * torch.log10((P.Gain(6.0, severity=0.5)(x, generator=seeded()) / x).flatten(1))
    torch.testing.assert_close(gain_db, gain_db[:, :1].expand_as(gain_db))
    assert -3.0 <= gain_db.min() < -2.8
    assert 2.8 < gain_db.max() <= 3.0


def test_time_shift_moves_whole_samples_and_uncovers_silence():
    x = torch.arange(1.0, 21.0).expand(200, 2, 20)
    y = P.TimeShift(0.2, severity=0.5)(x, generator=seeded())
    candidates = {shift: F.pad(x[0], (2, 2))[:, 2 - shift : 22 - shift] for shift in range(-2, 3)}
    seen = [next(shift for shift, moved in candidates.items() if torch.equal(row, moved)) for row in y]
    assert set(seen) == set(candidates)


@pytest.mark.parametrize("shape", [SPECTROGRAM, (2, *SPECTROGRAM)], ids=str)
def test_spec_mask_is_bands_of_frequency_and_spans_of_time(shape):
    x = batch(200, shape)
    perturb = P.SpecMask(0.4, 0.2, frequency_masks=2, time_masks=1, fill=7.0, severity=0.5)
    y = perturb(x, generator=seeded()).view(200, -1, *SPECTROGRAM)
    mask = (y == 7.0).all(1)
    bands, spans = mask.all(2), mask.all(1)
    assert torch.equal(mask, bands.unsqueeze(2) | spans.unsqueeze(1))
    assert torch.equal(y, x.view_as(y).masked_fill(mask.unsqueeze(1), 7.0))
    assert runs(bands).max() == 2
    assert runs(spans).max() == 1
    assert bands.sum(1).max() == 8  # 2 masks x 0.5 x 0.4 x 20
    assert spans.sum(1).max() == 3  # 1 mask x 0.5 x 0.2 x 30


# Images


@pytest.mark.parametrize(("padding_mode", "mode"), [("reflect", "reflect"), ("zeros", "constant")])
def test_crop_is_a_window_of_the_padded_image(padding_mode, mode):
    height, width = 16, 8
    x = batch(1, (3, height, width)).expand(300, 3, height, width)
    padded = F.pad(x[:1], (1, 1, 2, 2), mode=mode)[0]
    windows = [padded[:, i : i + height, j : j + width] for i in range(5) for j in range(3)]
    y = P.Crop(0.25, padding_mode, severity=0.5)(x, generator=seeded())
    seen = [next(k for k, window in enumerate(windows) if torch.equal(row, window)) for row in y]
    assert set(seen) == set(range(15))


def test_flip_mirrors_whole_images():
    x = batch(400, IMAGE)
    y = P.Flip(0.25)(x, generator=seeded())
    mirrored = (y == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(y[~mirrored], x[~mirrored])
    assert 70 < mirrored.sum() < 130
    assert torch.equal(P.Flip(0.25, severity=4.0)(x), x.flip(-1))


@pytest.mark.parametrize(
    ("only", "fixed_point"),
    [
        ("brightness", torch.zeros_like),
        ("contrast", lambda x: x.mean((1, 2, 3), keepdim=True)),
        ("saturation", lambda x: x.mean(1, keepdim=True)),
    ],
)
def test_color_jitter_stretches_about_its_fixed_point(only, fixed_point):
    x = batch(200, IMAGE, torch.float64)
    amounts = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, only: 0.6}
    y = P.ColorJitter(**amounts, severity=0.5)(x, generator=seeded())
    factor = ((y - fixed_point(x)) / (x - fixed_point(x))).flatten(1)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-6, atol=1e-6)
    assert 0.7 <= factor.min() + 1e-6 < 0.75
    assert 1.25 < factor.max() <= 1.3 + 1e-6
    y = P.ColorJitter(**amounts, severity=10.0)(x, generator=seeded())
    assert ((y - fixed_point(x)) / (x - fixed_point(x))).min() > -1e-6


def test_erase_is_one_bounded_rectangle():
    height, width = 32, 24
    x = batch(2000, (2, height, width))
    y = P.Erase(0.5, aspect=0.5, fill=7.0, severity=0.5)(x, generator=seeded())
    mask = (y == 7.0).all(1)
    rows, columns = mask.any(2), mask.any(1)
    assert torch.equal(mask, rows.unsqueeze(2) & columns.unsqueeze(1))
    assert torch.equal(y, x.masked_fill(mask.unsqueeze(1), 7.0))
    assert runs(rows).max() == runs(columns).max() == 1
    h, w = rows.sum(1), columns.sum(1)  # each rounded by at most half a pixel
    assert ((h - 0.5) * (w - 0.5) <= 0.25 * height * width).all()
    assert (h - 0.5 <= 2 * (w + 0.5)).all()
    assert (w - 0.5 <= 2 * (h + 0.5)).all()
    assert abs((h * w).float().mean() / (height * width) - 0.125) < 0.006
    assert abs((h > w).float().mean() - (w > h).float().mean()) < 0.1  # tall as often as wide
    assert rows.any(0).all()
    assert columns.any(0).all()


# Compositions


@dataclass(frozen=True)
class Add(P.TensorPerturbation):
    """Adds a constant: a perturbation without randomness."""

    layouts = ("(B, C)",)
    value: float = 1.0

    def _perturb(self, x, draws):
        return x + self.severity * self.value


def test_compose_applies_its_members_in_order_from_one_generator():
    x, generator = batch(4, WINDOW), seeded()
    expected = P.TimeWarp()(P.Jitter()(x, generator=generator), generator=generator)
    assert torch.equal(P.Compose(P.Jitter(), P.TimeWarp())(x, generator=seeded()), expected)


def test_random_apply_perturbs_whole_rows_with_its_probability():
    x = torch.zeros(4000, 3)
    y = P.RandomApply(Add(), 0.3)(x, generator=seeded())
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert abs(y[:, 0].mean() - 0.3) < 0.03
    for probability in (0.0, 1.0):
        assert torch.equal(P.RandomApply(Add(), probability)(x), x + probability)


def test_random_choice_takes_one_member_per_row_equally_often():
    y = P.RandomChoice(Add(1.0), Add(2.0), Add(3.0))(torch.zeros(6000, 2), generator=seeded())
    assert torch.equal(y, y[:, :1].expand_as(y))
    values, counts = y[:, 0].unique(return_counts=True)
    assert values.tolist() == [1.0, 2.0, 3.0]
    assert (counts / 6000 - 1 / 3).abs().max() < 0.03


def test_on_perturbs_entries_of_a_dict():
    x = {"imu": torch.zeros(2, 3), "mask": torch.ones(2, 3, dtype=torch.int64), "ecg": torch.zeros(2, 1)}
    y = P.Compose(P.On("imu", Add(1.0)), P.On("ecg", P.Compose(Add(2.0), Add(3.0))))(x)
    assert torch.equal(y["imu"], torch.full((2, 3), 1.0))
    assert torch.equal(y["ecg"], torch.full((2, 1), 5.0))
    assert y["mask"] is x["mask"]
    assert not x["imu"].any()
    assert not x["ecg"].any()


def test_with_severity_sets_every_member_of_a_copy():
    perturb = P.Compose(
        Add(severity=0.5), P.RandomApply(Add()), P.RandomChoice(Add(), Add(2.0)), P.Compose(P.Compose(Add()))
    )
    expected = P.Compose(
        Add(severity=3.0),
        P.RandomApply(Add(severity=3.0)),
        P.RandomChoice(Add(severity=3.0), Add(2.0, severity=3.0)),
        P.Compose(P.Compose(Add(severity=3.0))),
    )
    assert perturb.with_severity(3.0) == expected
    assert perturb.perturbs[0].severity == 0.5
    assert P.On("x", perturb).with_severity(3.0) == P.On("x", expected)


@pytest.mark.parametrize("preset", [P.sensor, P.audio_waveform, P.audio_spectrogram, P.image])
def test_presets_take_a_severity(preset):
    assert preset(0.3) == preset().with_severity(0.3)
    assert preset(0.3) != preset()


# Refusals


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: P.Jitter(-1.0), ValueError, "Jitter: std is -1.0; pass a finite number from 0.0 to inf"),
        (lambda: P.Jitter("1"), TypeError, "Jitter: std must be a plain Python number, got str"),
        (lambda: P.Jitter(True), TypeError, "Jitter: std must be a plain Python number, got bool"),
        (lambda: P.Scaling(severity=math.nan), ValueError, "Scaling: severity is nan"),
        (lambda: P.sensor(math.inf), ValueError, "TimeWarp: severity is inf"),
        (lambda: P.sensor().with_severity(-0.1), ValueError, "TimeWarp: severity is -0.1"),
        (lambda: P.AxisRotation(181), ValueError, "AxisRotation: max_degrees is 181; .* to 180.0"),
        (lambda: P.AxisRotation(triples=(0, 2)), ValueError, "AxisRotation: triples is .0, 2.; .* 3 apart"),
        (lambda: P.AxisRotation(triples=(-1,)), ValueError, "AxisRotation: triples is"),
        (lambda: P.AxisRotation(triples=3), ValueError, "AxisRotation: triples is 3; pass a tuple"),
        (lambda: P.TimeMask(spans=1.5), TypeError, "TimeMask: spans must be a plain Python integer"),
        (lambda: P.TimeMask(spans=0), ValueError, "TimeMask: spans is 0; pass a finite integer from 1"),
        (lambda: P.TimeWarp(knots=1), ValueError, "TimeWarp: knots is 1; pass a finite integer from 2"),
        (lambda: P.Noise(None), TypeError, "Noise: snr_db must be a plain Python number, got NoneType"),
        (lambda: P.SpecMask(fill=math.nan), ValueError, "SpecMask: fill is nan"),
        (
            lambda: P.Crop(padding_mode="same"),
            ValueError,
            "Crop: padding_mode 'same' .* 'reflect' or 'zeros'",
        ),
        (lambda: P.Erase(aspect=0), ValueError, "Erase: aspect is 0; pass a finite number from 0.01 to 1.0"),
        (lambda: P.Compose(), ValueError, "Compose: no perturbations given; pass at least one"),
        (lambda: P.RandomChoice(P.Flip(), abs), TypeError, "RandomChoice: .*abs.* is not a perturbation"),
        (lambda: P.RandomApply(None), TypeError, "RandomApply: None is not a perturbation"),
        (lambda: P.RandomApply(P.Flip(), 1.5), ValueError, "RandomApply: probability is 1.5"),
        (lambda: P.On("x", 3), TypeError, "On: 3 is not a perturbation"),
    ],
)
def test_bad_arguments_are_refused_at_construction(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    ("perturb", "x", "error", "message"),
    [
        (
            P.Jitter(),
            torch.zeros(2, 3),
            ValueError,
            r"Jitter: x must be \(B, C, L\) or .* got shape \(2, 3\);",
        ),
        (P.Flip(severity=0), torch.zeros(2, 3), ValueError, r"Flip: x must be \(B, C, H, W\), got shape"),
        (P.Flip(), torch.zeros(0, 3), ValueError, "Flip: x must be"),
        (
            P.Flip(),
            torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
            TypeError,
            "Flip: .* got torch.uint8; convert",
        ),
        (P.Gain(), torch.zeros(2, 3, dtype=torch.complex64), TypeError, "Gain: x must be floating point"),
        (P.Gain(), [1.0], TypeError, "Gain: x must be a tensor, got list; pass a batch"),
        (P.sensor(), {"x": torch.zeros(2)}, TypeError, "TimeWarp: x must be a tensor, got dict; wrap .* On"),
        (P.RandomApply(P.On("x", P.Gain())), {"x": torch.zeros(2, 9)}, TypeError, "RandomApply: x must be a"),
        (P.RandomChoice(P.Gain()), torch.tensor(1.0), ValueError, r"Gain: x must be .* got shape \(\);"),
        (
            P.AxisRotation(),
            torch.zeros(2, 4, 9),
            ValueError,
            "AxisRotation: x has 4 channels, not a multiple",
        ),
        (
            P.AxisRotation(triples=(0, 3)),
            torch.zeros(2, 5, 9),
            ValueError,
            "AxisRotation: .* beyond the 5 ch",
        ),
        (P.On("x", P.Gain()), torch.zeros(2, 9), TypeError, "On: x must be a mapping, got Tensor; call"),
        (
            P.On("x", P.Gain()),
            {"y": 1, "z": 2},
            ValueError,
            r"On: x has no entry 'x'; name one of \['y', 'z'\]",
        ),
    ],
)
def test_bad_input_is_refused_at_the_call(perturb, x, error, message):
    with pytest.raises(error, match=f"^{message}"):
        perturb(x)


@every_case
def test_a_generator_on_another_device_is_refused(perturb, shape):
    with pytest.raises(ValueError, match=r"the generator is on cpu but x is on meta; pass torch.Generator\('meta'\)"):
        perturb(torch.empty(2, *shape, device="meta"), generator=seeded())
