"""Exit heads: pooling, options, and which layout of features is understood."""

import pytest
import torch
from torch import nn

import cet
from cet import ExitHead, HeadSpec

B, K = 3, 4


def build(spec, module, shape, **options):
    return spec.build("block", module, torch.randn(shape, **options), K)


LAYOUTS = [
    # module, shape of its output, the dimension that holds the channels
    (nn.Linear(5, 6), (B, 6), 1),
    (nn.Conv1d(5, 6, 3), (B, 6, 9), 1),
    (nn.Conv2d(5, 6, 3), (B, 6, 9, 9), 1),
    (nn.Conv3d(5, 6, 3), (B, 6, 4, 4, 4), 1),
    (nn.ConvTranspose1d(5, 6, 3), (B, 6, 9), 1),
    (nn.BatchNorm1d(6), (B, 6, 9), 1),
    (nn.GroupNorm(2, 6), (B, 6, 9), 1),
    (nn.Sequential(nn.Conv1d(5, 6, 3), nn.ReLU()), (B, 6, 9), 1),
    (nn.Linear(5, 6), (B, 9, 6), -1),
    (nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6)), (B, 9, 6), -1),
    (nn.LayerNorm(6), (B, 9, 6), -1),
    (nn.RMSNorm(6), (B, 9, 6), -1),
    (nn.Embedding(10, 6), (B, 9, 6), -1),
    (nn.MultiheadAttention(6, 2, batch_first=True), (B, 9, 6), -1),
    (nn.LSTM(5, 6), (B, 9, 6), -1),
    (nn.LSTM(5, 6, bidirectional=True), (B, 9, 12), -1),
    (nn.LSTM(5, 6, proj_size=2), (B, 9, 2), -1),
    (nn.GRU(5, 6), (B, 9, 6), -1),
    (nn.TransformerEncoderLayer(6, 2, 24, batch_first=True), (B, 9, 6), -1),
    (nn.LayerNorm(6), (B, 4, 4, 6), -1),
    (nn.ReLU(), (B, 6, 4, 4), 1),
]


@pytest.mark.parametrize(("module", "shape", "channels"), LAYOUTS)
def test_the_layout_is_read_off_the_layers(module, shape, channels):
    head = build(HeadSpec(), module, shape)
    assert head.in_features == shape[channels]
    assert head.spec.layout == ("channels_first" if channels == 1 else "channels_last")
    assert head(torch.randn(shape)).shape == (B, K)


AMBIGUOUS = [
    (nn.ReLU(), (B, 6, 9)),
    (nn.Sequential(nn.Conv1d(5, 6, 3), nn.Linear(7, 9)), (B, 6, 9)),
    (nn.Conv1d(5, 6, 3), (B, 7, 9)),
]


@pytest.mark.parametrize(("module", "shape"), AMBIGUOUS)
def test_an_ambiguous_layout_is_asked_for(module, shape):
    with pytest.raises(ValueError, match=r"may be \(B, C, L\) or \(B, T, C\); say which with exits=\{'block': cet"):
        build(HeadSpec(), module, shape)
    for layout, width in (("channels_first", shape[1]), ("channels_last", shape[2])):
        assert build(HeadSpec(layout=layout), module, shape).in_features == width


FEATURE = torch.randn(B, 5, 2, 6, dtype=torch.float64)

POOLED = [
    (HeadSpec(layout="channels_first"), FEATURE, FEATURE.mean((2, 3))),
    (HeadSpec(layout="channels_last"), FEATURE, FEATURE.mean((1, 2))),
    (HeadSpec(layout="channels_first"), FEATURE[:, :, 0], FEATURE[:, :, 0].mean(2)),
    (HeadSpec(layout="channels_last"), FEATURE[:, :, 0], FEATURE[:, :, 0].mean(1)),
    (HeadSpec(pool="first"), FEATURE[:, :, 0], FEATURE[:, 0, 0]),
    (HeadSpec(pool="first", layout="channels_last"), FEATURE[:, :, 0], FEATURE[:, 0, 0]),
    (HeadSpec(), FEATURE[:, :, 0, 0], FEATURE[:, :, 0, 0]),
    (HeadSpec(layout="channels_last"), FEATURE[:, :, 0, 0], FEATURE[:, :, 0, 0]),
]


@pytest.mark.parametrize(("spec", "feature", "pooled"), POOLED)
def test_pooling(spec, feature, pooled):
    head = spec.build("block", nn.Identity(), feature, K)
    torch.testing.assert_close(head(feature), head.linear(pooled))


def test_norm_and_hidden_layer_follow_the_pooling():
    head = HeadSpec(layout="channels_last", norm=True, hidden=7).build("block", nn.Identity(), FEATURE, K)
    linear, gelu = head.hidden
    pooled = nn.functional.layer_norm(FEATURE.mean((1, 2)), (6,))
    assert linear.out_features == 7
    torch.testing.assert_close(head(FEATURE), head.linear(gelu(linear(pooled))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_head_takes_the_dtype_of_the_features(dtype):
    head = build(HeadSpec(norm=True, hidden=3), nn.Conv1d(5, 6, 3), (B, 6, 9), dtype=dtype)
    assert {p.dtype for p in head.parameters()} == {dtype}


@pytest.mark.parametrize(
    "options",
    [{}, {"layout": "channels_last", "pool": "first", "hidden": 3, "norm": True}, {"layout": "channels_last"}],
)
def test_a_head_can_be_described_and_built_again(options):
    head = ExitHead(6, K, **options)
    again = ExitHead(**head.to_dict())
    again.load_state_dict(head.state_dict())
    feature = torch.randn(B, 6, 6)
    assert torch.equal(again(feature), head(feature))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "NCHW"}, "layout 'NCHW' is unknown; choose one of channels_first, channels_last"),
        ({"pool": "max"}, "pool 'max' is unknown; choose one of mean, first"),
        ({"pool": "first", "layout": "channels_first"}, "pool 'first' takes the first token"),
        ({"hidden": 0}, "hidden is 0; give a positive width, or None"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HeadSpec(**options)


@pytest.mark.parametrize(
    ("spec", "feature", "message"),
    [
        (HeadSpec(), torch.zeros(B), r"exit 'block' gives features of shape \(3,\) and dtype torch.float32, which"),
        (HeadSpec(), torch.zeros(B, 6, dtype=torch.int64), "dtype torch.int64, which a head cannot pool"),
        (HeadSpec(), torch.zeros(B, 6, dtype=torch.complex64), "dtype torch.complex64, which a head cannot pool"),
        (HeadSpec(pool="first"), torch.zeros(B, 6), r"but pool 'first' needs \(B, T, C\); use pool='mean'"),
        (HeadSpec(pool="first"), torch.zeros(B, 6, 2, 2), r"but pool 'first' needs \(B, T, C\)"),
    ],
)
def test_features_that_cannot_be_pooled_are_refused(spec, feature, message):
    with pytest.raises(ValueError, match=message):
        spec.build("block", nn.Identity(), feature, K)


def test_a_head_that_mixes_rows_is_refused():
    class Centred(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x - x.mean(0))

    backbone = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    with pytest.raises(ValueError, match="the head of exit '0' mixes the rows of a batch"):
        cet.EarlyExit(backbone, {"0": Centred()}, (torch.randn(3, 4),))
