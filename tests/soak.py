"""Random use of models for as long as is wanted, each answer against that of every row alone.

``CET_SOAK_SEED`` repeats a run that failed, as far as threads allow.
"""

from __future__ import annotations

import copy
import faulthandler
import io
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import cet
from adapters import LoraLinear
from oracle import answers_of, exit_logits_of_each_row_alone, score_by_definition

K = 4
SECONDS = 20.0
"""That random use lasts in ``make test``; ``make soak`` gives CET_SOAK_SECONDS."""
PATIENCE = 90.0
"""Seconds that a call may take before it counts as hanging, on a machine with other work."""

Inputs = dict[str, Tensor]


class SoakError(AssertionError):
    """A wrong answer, an error or a hang, with what led to it."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = LoraLinear(nn.Linear(width, width))
        self.more = nn.ModuleList()
        self.drop = nn.Dropout(1.0)
        self.norm = nn.LayerNorm(width)
        self.gain = 1.0
        self.shift = torch.zeros(width)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x)) * self.gain + self.shift.to(x.dtype)
        for module in self.more:
            h = h + module(h)
        return self.norm(h + 0.1 * self.drop(x) + x)


class Tokens(nn.Module):
    """Blocks over ``(B, T, C)``; the length decides what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.a, self.b, self.c = Block(8), Block(8), Block(8)
        self.top = nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(self.embed(x))
        if h.shape[1] > 14:
            h = F.avg_pool1d(h.transpose(1, 2), 2).transpose(1, 2)
        h = self.c(self.b(h))
        return self.top(h.mean(1))


class Recurrent(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(self.embed(x))
        h, _ = self.rnn(h)
        return self.top(self.c(self.b(h))[:, -1])


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
        self.a, self.b, self.c = Block(8), Block(8), Block(8)
        self.top = nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool1d(self.stem(x.transpose(1, 2)), 2)
        return self.top(self.c(self.b(self.a(h.transpose(1, 2)))).amax(1))


BACKBONES = [Tokens, Recurrent, Pooling]


class World:
    """A model, the ways to change it, and the ways to ask it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.history: list[str] = []
        self.undo: list[tuple[str, Callable[[], Any]]] = []
        self.new_model()

    def new_model(self) -> None:
        kind = self.random.choice(BACKBONES)
        self.dtype = torch.float32
        self.undo = []
        self.note(f"a new {kind.__name__}")
        exits = {path: cet.HeadSpec(layout="channels_last") for path in self.random.choice([["a"], ["a", "b"], ["b"]])}
        self.model = cet.EarlyExit(kind().eval(), exits, {"x": torch.randn(4, 12, 3)}).eval()

    def note(self, what: str) -> None:
        self.history.append(what)

    # -- changes ------------------------------------------------------------------------------------------------------

    def block(self) -> Block:
        name = self.random.choice("abc")
        self.note(f"  in block {name}")
        return self.model.backbone.get_submodule(name)  # type: ignore[return-value]

    def change(self) -> None:
        changes = [name for name in vars(World) if name.startswith("change_")]
        name = self.random.choice(changes)
        self.note(name.removeprefix("change_"))
        getattr(self, name)()

    def change_gain(self) -> None:
        self.block().gain = self.random.uniform(0.5, 2.0)

    def change_shift(self) -> None:
        block = self.block()
        if self.random.random() < 0.5:
            block.shift = torch.randn(8)
        else:
            block.shift.add_(torch.randn(8))

    def change_weights_in_place(self) -> None:
        with torch.no_grad():
            for parameter in self.block().parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def change_heads(self) -> None:
        with torch.no_grad():
            for head in self.model.heads:
                head.linear.weight.mul_(self.random.uniform(0.5, 2.0))

    def change_hook(self) -> None:
        factor = self.random.uniform(0.5, 2.0)
        module = self.random.choice([self.block(), self.block().layer, self.model.backbone.top, self.model.heads[0]])
        handle = module.register_forward_hook(lambda _m, _i, output: output * factor)
        self.undo.append(("hook removed", handle.remove))

    def change_forward(self) -> None:
        layer = self.block().norm
        if "forward" in vars(layer):
            return
        factor = self.random.uniform(0.5, 2.0)
        layer.forward = lambda x, m=layer: (
            factor
            * F.layer_norm(  # type: ignore[method-assign]
                x, m.normalized_shape, m.weight, m.bias, m.eps
            )
        )
        self.undo.append(("forward deleted", lambda: vars(layer).pop("forward", None)))

    def change_back(self) -> None:
        if self.undo:
            name, undo = self.undo.pop(self.random.randrange(len(self.undo)))
            self.note(f"  {name}")
            undo()

    def change_modules(self) -> None:
        more = self.block().more
        if len(more) and self.random.random() < 0.5:
            more.pop(len(more) - 1)
        else:
            more.append(nn.Linear(8, 8).to(self.dtype))

    def change_parametrization(self) -> None:
        layer = self.block().layer.base_layer
        if parametrize.is_parametrized(layer) and self.random.random() < 0.5:
            parametrize.remove_parametrizations(layer, "weight")
        else:
            parametrize.register_parametrization(layer, "weight", Scaled(self.random.uniform(0.5, 1.5)))

    def change_pruning(self) -> None:
        layer = self.model.backbone.top
        prune.random_unstructured(layer, "weight", 0.3)

    def change_adapter(self) -> None:
        lora = self.block().layer
        step = self.random.choice(["scaling", "disabled", "active", "merge", "unmerge"])
        self.note(f"  {step}")
        if parametrize.is_parametrized(lora.base_layer) and step in ("merge", "unmerge"):
            return
        if step == "scaling":
            lora.scaling["one"] = self.random.uniform(0.5, 3.0)
        elif step == "disabled":
            lora._disable_adapters = not lora._disable_adapters
        elif step == "active":
            lora._active_adapter[:] = self.random.choice([["one"], ["two"], ["one", "two"], []])
        elif step == "merge":
            lora.merge()
        else:
            lora.unmerge()

    def change_mode_of_a_submodule(self) -> None:
        drop = self.block().drop
        drop.train(not drop.training)

    def change_mode(self) -> None:
        self.model.train()
        self.model.eval()

    def change_dtype(self) -> None:
        self.dtype = torch.float64 if self.dtype == torch.float32 else torch.float32
        self.model.to(self.dtype)

    def change_for_a_copy(self) -> None:
        if self.undo:
            return  # hooks and forwards that hold on to modules belong to the original
        if self.random.random() < 0.5:
            # Pruning leaves a product as `weight`, which PyTorch copies only where no gradient hangs on it.
            with torch.no_grad():
                self.model.backbone(**self.inputs())
            self.model = copy.deepcopy(self.model)
            return
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        self.model.load_state_dict(torch.load(file, weights_only=True))

    # -- calls --------------------------------------------------------------------------------------------------------

    def inputs(self) -> Inputs:
        rows = self.random.choice([1, 2, 3, 5, 9])
        length = self.random.choice([12, 12, 12, 13, 14, 15, 16, 18, 21])
        return {"x": torch.randn(rows, length, 3, dtype=self.dtype)}

    def calls(self, count: int) -> list[Callable[[], None]]:
        """Calls with their right answers, under a policy that parts the rows of all of them."""
        batches = [self.inputs() for _ in range(count)]
        expected = [exit_logits_of_each_row_alone(self.model, **inputs) for inputs in batches]
        together = [torch.cat(logits) for logits in zip(*expected, strict=True)]
        self.model.policy = cet.ExitPolicy("entropy", tuple(widest_gap(logits) for logits in together[:-1]))
        return [
            self.call(self.random.choice(["predict", "predict", "predict", "eval", "exit_logits", "check"]), *pair)
            for pair in zip(batches, expected, strict=True)
        ]

    def call(self, how: str, inputs: Inputs, expected: list[Tensor]) -> Callable[[], None]:
        model = self.model
        answers = answers_of(expected, model.policy)

        def run() -> None:
            with torch.no_grad():
                if how == "exit_logits":
                    for got, wanted in zip(model.exit_logits(**inputs), expected, strict=True):
                        assert_close(got, wanted)
                elif how == "check":
                    model.check(**inputs)
                elif how == "eval":
                    assert_close(model(**inputs), answers.logits)
                else:
                    found = model.predict(**inputs)
                    assert torch.equal(found.exit_index, answers.exit_index), (found.exit_index, answers.exit_index)
                    assert_close(found.logits, answers.logits)

        return run

    def round(self) -> None:
        way = self.random.choice(["one", "one", "one", "threads", "fork", "fork beside threads"])
        self.note(way)
        if way == "one":
            for call in self.calls(2):
                call()
            return
        if way == "fork":
            forked(self.calls(2))
            return
        calls = self.calls(4)
        errors: list[BaseException] = []
        threads = [threading.Thread(target=guarded, args=(call, errors), daemon=True) for call in calls[1:]]
        for thread in threads:
            thread.start()
        if way == "fork beside threads":
            forked(calls[:1])
        else:
            calls[0]()
        end = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        if errors:
            raise errors[0]
        if any(thread.is_alive() for thread in threads):
            raise SoakError("a thread hangs")


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def guarded(call: Callable[[], None], errors: list[BaseException]) -> None:
    try:
        for _ in range(3):
            call()
    except BaseException as error:
        errors.append(error)


def forked(calls: list[Callable[[], None]]) -> None:
    """The calls in a forked child, which may neither fail nor hang; where it hangs is written to standard error.

    A fork copies the locks of PyTorch's own libraries as they are, held by threads that the child lacks: convolutions
    alone, without cet, hang in half of the children that are forked beside threads that convolve at new shapes. Where a
    child waits within an operator of PyTorch, called by PyTorch or the code of a stage, no code of cet could help it.
    """
    trace = tempfile.TemporaryFile("w+")  # noqa: SIM115 (of both processes)
    faulthandler.register(signal.SIGUSR1, file=trace)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for call in calls:
                call()
            code = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(code)
    os.close(writer)
    end = time.monotonic() + PATIENCE
    done = status = 0
    while not done and time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.005)
    if not done:
        os.kill(child, signal.SIGUSR1)
        time.sleep(1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        trace.seek(0)
        where = trace.read()
        innermost = next((line for line in where.splitlines() if line.startswith("  File ")), "")
        if f"{os.sep}torch{os.sep}" in innermost or '"<cet stage_' in innermost:
            print(f"PyTorch hangs in a forked child:\n{where}", file=sys.__stderr__, flush=True)
            return
        raise SoakError(f"a forked child hangs:\n{where}")
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    if os.waitstatus_to_exitcode(status):
        raise SoakError(f"a forked child failed: {said}")


def widest_gap(logits: Tensor) -> float | None:
    """A threshold in the widest gap of the entropies in the middle; None where rounding would decide."""
    scores = sorted(score_by_definition(row, "entropy", 1.0) for row in logits)
    first, last = len(scores) // 5, len(scores) - len(scores) // 5
    gaps = [(b - a, (a + b) / 2) for a, b in zip(scores[first:last], scores[first + 1 : last], strict=False)]
    width, middle = max(gaps, default=(0.0, 0.0))
    return middle if width > 2e-3 else None


def soak(seconds: float, seed: int) -> dict[str, Any]:
    """Change and ask models until the time is over.

    Returns:
        How many rounds were run, on how many models.

    Raises:
        SoakError: for the first answer that is not that of every row alone, error or hang; with the seed and the steps
            that the model had gone through.
    """
    end = time.monotonic() + seconds
    models = rounds = 0
    while time.monotonic() < end:
        world_seed = seed + models
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            world = World(world_seed)
            models += 1
            try:
                for _ in range(12):
                    if time.monotonic() > end:
                        break
                    for _ in range(world.random.choice([0, 1, 1, 2])):
                        world.change()
                    world.round()
                    rounds += 1
            except Exception as error:
                steps = "\n  ".join(world.history)
                raise SoakError(f"CET_SOAK_SEED={world_seed} failed after\n  {steps}\n{error!r}") from error
    return {"rounds": rounds, "models": models}


def soak_from_environment() -> None:
    seconds = float(os.environ.get("CET_SOAK_SECONDS", SECONDS))
    seed = int(os.environ.get("CET_SOAK_SEED", 0)) or random.randrange(10**9)
    print(f"CET_SOAK_SEED={seed}", flush=True)
    print(soak(seconds, seed), flush=True)
