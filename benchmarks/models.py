"""The benchmarked nets, with random weights: a sensor CNN, ViTs, ResNets and a BERT, three early exits each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import cet


@dataclass(frozen=True)
class Net:
    """A backbone, where it may be left, and the same net cut by hand.

    Attributes:
        backbone: the whole net.
        exits: paths of the submodules after which a sample may leave, with their heads.
        sample_shape: shape of one input row.
        vocabulary: how many words there are, where the input is tokens.
        stages: what a user would write to run the net from exit to exit: each function takes the features of the
            exit before, the first one the input, and the last returns the logits.
    """

    backbone: nn.Module
    exits: dict[str, cet.HeadSpec | None]
    sample_shape: tuple[int, ...]
    stages: tuple[Callable[[Tensor], Tensor], ...]
    vocabulary: int | None = None


def sensor_cnn() -> Net:
    """The four-block residual 1-D CNN of the demo, on windows of 6 axes and 128 samples."""
    from cet.training.sensor_net import EXITS, SensorNet

    net = SensorNet(num_classes=7)
    return Net(
        backbone=net,
        exits=dict.fromkeys(EXITS, cet.HeadSpec(layout="channels_first")),
        sample_shape=(6, 128),
        stages=(net.block1, net.block2, net.block3, lambda h: net.classifier(net.block4(h).mean(2))),
    )


def vit_tiny() -> Net:
    """ViT-Ti/16 at 224 pixels (Touvron et al. 2021, arXiv 2012.12877), left after 3, 6 and 9 of its 12 layers."""
    return _vit(hidden_size=192, num_attention_heads=3, intermediate_size=768)


def vit_base() -> Net:
    """ViT-B/16 at 224 pixels (Dosovitskiy et al. 2021, arXiv 2010.11929), left after 3, 6 and 9 of its 12 layers."""
    return _vit(hidden_size=768, num_attention_heads=12, intermediate_size=3072)


def _vit(**sizes: int) -> Net:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(num_labels=1000, **sizes)
    net = ViTForImageClassification(config)
    vit, layers = net.vit, net.vit.layers
    head = cet.HeadSpec(pool="first")
    last = nn.Sequential(*layers[9:], vit.layernorm)
    return Net(
        backbone=net,
        exits={f"vit.layers.{index}": head for index in (2, 5, 8)},
        sample_shape=(3, 224, 224),
        stages=(
            nn.Sequential(vit.embeddings, *layers[:3]),
            nn.Sequential(*layers[3:6]),
            nn.Sequential(*layers[6:9]),
            lambda h: net.classifier(last(h)[:, 0]),
        ),
    )


def resnet18() -> Net:
    """ResNet-18 at 224 pixels (He et al. 2016, arXiv 1512.03385), left after its first three stages."""
    return _resnet([64, 128, 256, 512], [2, 2, 2, 2], "basic")


def resnet50() -> Net:
    """ResNet-50 at 224 pixels (He et al. 2016, arXiv 1512.03385), left after its first three stages."""
    return _resnet([256, 512, 1024, 2048], [3, 4, 6, 3], "bottleneck")


def _resnet(widths: list[int], depths: list[int], layer_type: str) -> Net:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(hidden_sizes=widths, depths=depths, layer_type=layer_type, num_labels=1000)
    net = ResNetForImageClassification(config)
    resnet, stages = net.resnet, net.resnet.encoder.stages
    return Net(
        backbone=net,
        exits={f"resnet.encoder.stages.{index}": None for index in range(3)},
        sample_shape=(3, 224, 224),
        stages=(
            nn.Sequential(resnet.embedder, stages[0]),
            stages[1],
            stages[2],
            nn.Sequential(stages[3], resnet.pooler, net.classifier),
        ),
    )


def bert_tiny() -> Net:
    """TinyBERT-4 on 128 tokens (Jiao et al. 2020, arXiv 1909.10351), left after each of its first three layers."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 312, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 1200}
    net = BertForSequenceClassification(BertConfig(num_labels=7, **sizes))
    bert, layers = net.bert, net.bert.encoder.layer
    return Net(
        backbone=net,
        exits={f"bert.encoder.layer.{index}": cet.HeadSpec(pool="first") for index in range(3)},
        sample_shape=(128,),
        stages=(
            nn.Sequential(bert.embeddings, layers[0]),
            layers[1],
            layers[2],
            lambda h: net.classifier(bert.pooler(layers[3](h))),
        ),
        vocabulary=net.config.vocab_size,
    )


NETS: dict[str, Callable[[], Net]] = {
    "sensor_cnn": sensor_cnn,
    "vit_tiny": vit_tiny,
    "resnet18": resnet18,
    "vit_base": vit_base,
    "resnet50": resnet50,
    "bert_tiny": bert_tiny,
}


def random_inputs(net: Net, rows: int) -> Tensor:
    """Noise ``(rows, *sample_shape)`` around a level per row and channel, so that the rows' features differ; tokens
    for a net that takes them."""
    if net.vocabulary is not None:
        return torch.randint(net.vocabulary, (rows, *net.sample_shape))
    channels, *positions = net.sample_shape
    return torch.randn(rows, channels, *positions) + torch.randn(rows, channels, *(1 for _ in positions))


@torch.no_grad()
def multi_exit(net: Net, example: Tensor) -> cet.EarlyExit:
    """The net with exits, in eval mode, whose random heads are scaled to give logits of mean 0 and deviation 2.

    Then scores differ from row to row as those of trained heads do, and a threshold between two rows is not a matter
    of rounding.
    """
    model = cet.EarlyExit(net.backbone, net.exits, (example,)).eval()
    for head, logits in zip(model.heads, model.exit_logits(example), strict=False):
        scale = 2.0 / logits.std(dim=0).mean()
        head.linear.bias.sub_(logits.mean(dim=0)).mul_(scale)
        head.linear.weight.mul_(scale)
    return model
