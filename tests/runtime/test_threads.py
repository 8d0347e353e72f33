"""Threads, forked children and models inside models: no answer is mixed with another call's, and nothing hangs."""

from __future__ import annotations

import copy
import faulthandler
import io
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import cet
from oracle import answers_of, exit_logits_of_eager_backbone, policy_that_parts
from thinned import slow
from watchdog import in_a_process

R = torch.randn
K = 5
LENGTHS = [40, 41, 44, 50, 51, 57, 60, 61, 64, 70, 77, 80, 90]


def net() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv1d(6, 8, 5), nn.Tanh()),
        nn.Sequential(nn.Conv1d(8, 8, 5), nn.Tanh()),
        nn.MaxPool1d(2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, K),
    ).eval()


def build(**options: Any) -> cet.EarlyExit:
    return cet.EarlyExit(net(), ["0", "1"], (R(4, 6, 40),), **options).eval()


def assert_same(got: Any, expected: Any) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def run_together(works: list[Callable[[], None]], seconds: float = 50) -> None:
    """Start all at once; the first error of any is raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            barrier.wait(seconds)
            with torch.no_grad():
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if errors:
        raise errors[0]
    hanging = sum(thread.is_alive() for thread in threads)
    if hanging:
        time.sleep(10_000)  # the watchdog writes where


def repeated(call: Callable[[], Any], expected: Any, times: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(times):
            assert_same(call(), expected)

    return work


def exit_logits_from_threads(num_threads: int, mode: str) -> None:
    model = build()
    model.train(mode == "train")
    works = []
    for index in range(num_threads):
        x = R(3 + index, 6, 40)
        call = model if mode == "train" else model.exit_logits
        works.append(repeated(lambda x=x, call=call: call(x), exit_logits_of_eager_backbone(model, x), 60))
    run_together(works)


@pytest.mark.parametrize("mode", ["eval", slow("train")])
def test_the_logits_of_all_exits_from_many_threads_are_each_threads_own(mode: str) -> None:
    in_a_process(exit_logits_from_threads, 8, mode)


def every_way_to_call_at_once() -> None:
    model = build()
    x = [R(3 + index, 6, 40) for index in range(6)]
    every_exit = [exit_logits_of_eager_backbone(model, part) for part in x]
    model.policy = policy_that_parts([torch.cat(parts) for parts in zip(*every_exit, strict=True)])
    answers = [answers_of(logits, model.policy).logits for logits in every_exit]
    y = torch.randint(K, (len(x[4]),))
    costs = cet.exit_costs(model)

    def cost() -> list[Tensor]:
        return [torch.tensor(cet.calibrate(model, [(x[4], y)], 0.5, costs=costs).report.mean_cost)]

    mean_cost = cost()
    twin = model.backbone  # a plain call of the user's own module
    run_together(
        [
            repeated(lambda: model.exit_logits(x[0]), every_exit[0], 100),
            repeated(lambda: [model.predict(x[1]).logits], [answers[1]], 100),
            repeated(lambda: [model(x[2])], [answers[2]], 100),
            repeated(lambda: [twin(x[3])], every_exit[3][-1:], 300),
            repeated(cost, mean_cost, 10),
            repeated(lambda: [model.check(x[5]) is None or 1], [True], 10),
        ]
    )


def test_every_way_to_call_a_model_may_be_used_at_once() -> None:
    in_a_process(every_way_to_call_at_once)


def costs_beside_calls() -> None:
    model, x = build(), R(3, 6, 40)
    costs = cet.exit_costs(model)
    stages, heads = torch.tensor(costs.stage), torch.tensor(costs.head)

    def count() -> list[Tensor]:
        found = cet.exit_costs(model)
        return [torch.tensor(found.stage), torch.tensor(found.head)]

    expected = exit_logits_of_eager_backbone(model, x)
    run_together([repeated(count, [stages, heads], 20), repeated(lambda: model.exit_logits(x), expected, 300)])


def test_flops_are_counted_of_the_counting_call_alone() -> None:
    in_a_process(costs_beside_calls)


def shapes_from_threads() -> None:
    model = build()
    inputs = [R(3, 6, length) for length in LENGTHS]
    expected = [exit_logits_of_eager_backbone(model, x) for x in inputs]
    model.policy = policy_that_parts([torch.cat(parts) for parts in zip(*expected, strict=True)])
    answers = [answers_of(logits, model.policy) for logits in expected]

    def work(offset: int) -> Callable[[], None]:
        def run() -> None:
            for step in range(2 * len(inputs)):
                index = (step * (offset + 1) + offset) % len(inputs)
                got = model.predict(inputs[index])
                assert torch.equal(got.exit_index, answers[index].exit_index)
                assert_same([got.logits], [answers[index].logits])
                if offset % 3 == 0:
                    assert_same(model.exit_logits(inputs[index]), expected[index])
                if offset % 3 == 1:
                    with pytest.raises(RuntimeError, match=r"channels"):
                        model.predict(R(3, 7, 40 + step))

        return run

    run_together([work(offset) for offset in range(8)])


def test_eight_threads_predict_thirteen_lengths() -> None:
    in_a_process(shapes_from_threads)


def plain_calls_beside_cuts() -> None:
    """The backbone's own weights, in a thread that knows nothing of early exits, while others cut it."""
    models = [build()]
    models += [cet.EarlyExit(models[0].backbone, ["0"], (R(4, 6, 40),)).eval() for _ in range(2)]
    backbone, stop, x = models[0].backbone, threading.Event(), R(5, 6, 40)
    with torch.no_grad():
        expected = backbone(x)

    def cut(model: cet.EarlyExit) -> Callable[[], None]:
        def run() -> None:
            try:
                for length in LENGTHS:
                    part = R(3, 6, length)
                    assert_same([model.predict(part).logits], exit_logits_of_eager_backbone(model, part)[-1:])
            finally:
                stop.set()

        return run

    def call() -> None:
        while not stop.is_set():
            got = backbone(x)
            assert type(got) is Tensor
            assert_same([got], [expected])

    run_together([*(cut(model) for model in models), call, call])
    assert all(type(p) is nn.Parameter for p in backbone.parameters())


def test_plain_calls_of_the_backbone_go_on_while_it_is_cut() -> None:
    in_a_process(plain_calls_beside_cuts)


def layers_replaced_beside_calls() -> None:
    model, x = build(), R(6, 6, 40)
    end = time.monotonic() + 1

    def replace() -> None:
        while time.monotonic() < end:
            model.backbone[1] = nn.Sequential(nn.Conv1d(8, 8, 5), nn.Tanh()).eval()
            time.sleep(0.01)

    def call() -> None:
        while time.monotonic() < end:
            assert model.predict(x).logits.isfinite().all()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cet.UncutWarning)
        run_together([replace, call, call, call])
        assert_same([model.predict(x).logits], [model.backbone(x)])


def test_calls_are_answered_while_another_thread_replaces_layers() -> None:
    in_a_process(layers_replaced_beside_calls)


class Nested(nn.Module):
    """A head that asks another model; a call from within that model gets its own linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, K)
        self.others: list[cet.EarlyExit] = []  # in a list: no submodule
        self.inside = threading.local()
        self.barrier: threading.Barrier | None = None

    def forward(self, feature: Tensor) -> Tensor:
        logits: Tensor = self.linear(feature.mean(2))
        if not self.others or getattr(self.inside, "now", False):
            return logits
        self.inside.now = True
        if self.barrier is not None:
            self.barrier.wait(60)
        try:
            for other in self.others:
                logits = logits + other.predict(R(1, 6, 48 + int(feature.shape[0]))).logits.mean() * 0
                logits = logits + other.exit_logits(R(2, 6, 40))[0].mean() * 0
        finally:
            self.inside.now = False
        return logits


def models_that_ask_each_other(num_threads: int) -> None:
    heads = [Nested(), Nested()]
    a, b = (cet.EarlyExit(net(), {"0": head}, (R(4, 6, 40),)).eval() for head in heads)
    heads[0].others, heads[1].others = [b], [a]
    for model in (a, b):
        model.policy = cet.ExitPolicy("confidence", (float("inf"),))
    barrier = threading.Barrier(num_threads)
    heads[0].barrier = heads[1].barrier = barrier
    shared = heads[0].inside  # one depth for both: a asks b, and b then answers on its own
    heads[1].inside = shared

    def work(model: cet.EarlyExit, rows: int) -> Callable[[], None]:
        def run() -> None:
            x = R(rows, 6, 40)
            assert_same([model.predict(x).logits], [model.backbone(x)])

        return run

    run_together([work((a, b)[index % 2], 2 + index) for index in range(num_threads)])


def test_models_whose_heads_ask_each_other_do_not_wait_for_each_other() -> None:
    """All of them are in a head of their model when they ask, with a new length, for an answer of the other."""
    in_a_process(models_that_ask_each_other, 4)


def model_in_a_model() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.exit_logits(x)[0]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.top = Stem(), nn.Linear(K, 8), nn.Linear(8, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(torch.tanh(self.b(self.a(x))))

    outer = cet.EarlyExit(Outer().eval(), ["b"], (R(4, 6, 40),)).eval()
    outer.backbone.a.inner.policy = cet.ExitPolicy.closed(3)

    def work(rows: int) -> Callable[[], None]:
        x = R(rows, 6, 40 + rows)
        return repeated(lambda: [outer.predict(x).logits], exit_logits_of_eager_backbone(outer, x)[-1:], 5)

    run_together([work(rows) for rows in (2, 3, 4)])


def test_a_model_whose_backbone_holds_a_model_answers() -> None:
    in_a_process(model_in_a_model)


def reached_from_a_hook_of_its_own_backbone() -> None:
    """A call that asks the model again, from the thread that owns whatever is locked."""
    model, x, seen = build(), R(3, 6, 40), []
    expected = exit_logits_of_eager_backbone(model, x)[-1]

    def ask(*_: Any) -> None:
        if not seen:
            seen.append(None)
            seen.append(model.exit_logits(R(2, 6, 52)))
            seen.append(model.predict(R(2, 6, 53)))

    model.heads[0].register_forward_hook(ask)
    model.policy = cet.ExitPolicy("confidence", (float("inf"), None))
    run_together([lambda: assert_same([model.predict(x).logits], [expected])])
    assert len(seen) == 3


def test_a_head_may_ask_its_own_model_again() -> None:
    in_a_process(reached_from_a_hook_of_its_own_backbone)


def fork_beside(work: str) -> None:
    model = build()
    stop = threading.Event()
    lengths = LENGTHS * 1000

    fixed = R(3, 6, 40)  # a fork while PyTorch draws numbers copies the lock of its generator

    def busy() -> None:
        for length in lengths:
            if stop.is_set():
                return
            if work == "cutting":
                twin = copy.deepcopy(model)  # has no program yet
                twin.predict(torch.zeros(3, 6, length))
            elif work == "exit_logits":
                model.exit_logits(fixed)
            else:
                model.predict(fixed)

    faulthandler.register(signal.SIGUSR1)
    inputs = [R(3, 6, 45 + turn) for turn in range(5)]
    answers = [exit_logits_of_eager_backbone(model, x) for x in inputs]  # before: its hooks see all threads
    threads = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn, (x, expected) in enumerate(zip(inputs, answers, strict=True)):
        time.sleep(0.1)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                assert_same([model.predict(x).logits], expected[-1:])
                assert_same(model.exit_logits(x), expected)
                code = 0
            finally:
                os._exit(code)
        end = time.monotonic() + 30
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done or time.monotonic() > end:
                break
            time.sleep(0.02)
        if not done:
            os.kill(child, signal.SIGUSR1)  # it writes where it hangs
            time.sleep(1)
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert done, f"the child of turn {turn} hangs"
        assert os.waitstatus_to_exitcode(status) == 0
    stop.set()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize("work", ["predict", slow("exit_logits"), "cutting"])
def test_a_child_that_is_forked_while_other_threads_work_answers(work: str) -> None:
    in_a_process(fork_beside, work)


class Predicted(Dataset[Tensor]):
    """A data set whose samples a model looks at, in the loader's forked workers."""

    def __init__(self, model: cet.EarlyExit) -> None:
        self.model = model

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        x = torch.linspace(-1, 1, 6 * LENGTHS[index]).view(1, 6, -1)
        return self.model.predict(x).logits[0]


def loader_workers() -> None:
    model = build()
    data = Predicted(model)
    lengths = [torch.linspace(-1, 1, 6 * length).view(1, 6, -1) for length in LENGTHS[:12]]
    expected = torch.cat([exit_logits_of_eager_backbone(model, x)[-1] for x in lengths])
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            model.predict(R(3, 6, 40))

    thread = threading.Thread(target=busy, daemon=True)
    thread.start()
    for _ in range(2):
        loader = DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=40)
        assert_same([torch.cat(list(loader))], [expected])
    stop.set()
    thread.join(60)


def test_forked_workers_of_a_loader_answer() -> None:
    in_a_process(loader_workers)


def test_a_model_can_be_copied_pickled_and_stored_after_calls() -> None:
    model, x = build(), R(3, 6, 40)
    model.policy = cet.ExitPolicy("confidence", (0.3, None))
    expected = model.predict(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        got = twin.predict(x)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.exit_index, expected.exit_index)
        assert twin.policy == model.policy


def test_an_error_in_a_call_leaves_nothing_locked() -> None:
    model = build()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="channels"):
            model.predict(R(3, 7, 40))
        with pytest.raises(RuntimeError, match="channels"):
            model.exit_logits(R(3, 7, 41))
    run_together([lambda: model.predict(R(2, 6, 42)) and None, lambda: model.exit_logits(R(2, 6, 43)) and None])


def test_samples_leave_while_another_thread_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.export`` says so in every thread."""
    model, x = build(), R(8, 6, 40)
    every_exit = exit_logits_of_eager_backbone(model, x)
    model.policy = policy_that_parts(every_exit)
    model.predict(x)
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_exporting()
    assert_same([model.predict(x).logits, model(x)], [answers_of(every_exit, model.policy).logits] * 2)
