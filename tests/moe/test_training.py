"""fusedmerge.moe.train: it learns what needs routing, goes on bit by bit, and repeats itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import fusedmerge as fm
from fusedmerge.moe.training import learning_rate

CLUSTERS, WIDTH = 4, 12


class Regression(nn.Module):
    """One linear with a mean squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        out = self.linear(x)
        return SimpleNamespace(loss=(out - labels).square().mean(), out=out)


def clusters() -> tuple[torch.Tensor, torch.Tensor]:
    """Points around CLUSTERS centres; each cluster has a map of its own."""
    generator = torch.Generator().manual_seed(3)
    centres, maps = 2 * torch.randn(CLUSTERS, WIDTH, generator=generator), torch.randn(CLUSTERS, WIDTH, WIDTH, generator=generator)
    which = torch.arange(512) % CLUSTERS
    x = centres[which] + torch.randn(512, WIDTH, generator=generator)
    return x, torch.einsum("toi,ti->to", maps[which], x)


@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_learns_what_one_matrix_cannot(k: int) -> None:
    """The best single matrix of any rank is known by least squares; routed experts of rank WIDTH / 2 get below it by far."""
    x, y = clusters()
    best = torch.linalg.lstsq(x.double(), y.double()).solution
    floor = float((x.double() @ best - y.double()).square().mean())
    config = fm.moe.LoRAMoEConfig(num_experts=4, top_k=k, r=WIDTH // 2, lora_alpha=WIDTH, balance_loss_coef=0.01)
    model = fm.moe.inject(Regression(), config)
    losses = fm.moe.train(model, [{"x": x, "labels": y}], 400, lr=2e-2, progress=False)
    assert losses[0] > floor
    with torch.no_grad():
        reached = float((model(x, y).out - y).square().mean())
    assert reached < 0.5 * floor


@pytest.mark.parametrize("k", [1, 2])
def test_the_router_learns_from_the_task_alone(k: int) -> None:
    model = llama(top_k=k, balance_loss_coef=0.0, init_lora_weights=False)
    model(**batches()[0]).loss.backward()
    (router,) = fm.moe.structure(model).routers.values()
    gradient = router.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert (gradient.abs().amax(dim=1) > 0).sum() >= 2  # not only through one expert


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    )
    return fm.moe.inject(base, fm.moe.LoRAMoEConfig(**{"num_experts": 4, "top_k": 2, "r": 4, "lora_alpha": 8, **options}), seed=1)


def batches(count: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 40, (count, 2, 10), generator=generator)
    return [{"input_ids": t, "labels": t} for t in tokens]


def loader() -> DataLoader:
    """Shuffled by the global generator, 5 batches an epoch."""
    rows = torch.cat([batch["input_ids"] for batch in batches(5)])
    return DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=2, shuffle=True)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Interrupted:
    """A loader that breaks off."""

    def __init__(self, inner: DataLoader, after: int) -> None:
        self.inner, self.left = inner, after

    def __iter__(self) -> Iterator[Any]:
        for batch in self.inner:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_resume_is_bit_equal(tmp_path: Path, autocast: torch.dtype | None) -> None:
    """Dropout, a shuffling loader, accumulation over an epoch's end, a schedule: broken off in step 5, resumed from step 4."""
    options: dict[str, Any] = {"lr": 5e-3, "warmup_steps": 3, "final_lr": 0.1, "accumulate": 2, "autocast": autocast, "progress": False}
    whole = llama(lora_dropout=0.2)
    losses = fm.moe.train(whole, loader(), 9, **options)
    path = tmp_path / "checkpoint.pt"
    first = llama(lora_dropout=0.2)
    with pytest.raises(KeyboardInterrupt):
        fm.moe.train(first, Interrupted(loader(), 11), 9, checkpoint=path, checkpoint_every=4, **options)
    torch.manual_seed(77)  # whatever the next process draws before
    second = llama(lora_dropout=0.2)
    assert fm.moe.train(second, loader(), 9, checkpoint=path, checkpoint_every=4, **options) == losses
    assert same(trained(whole), trained(second))
    assert not same(trained(whole), trained(first))
    third = llama(lora_dropout=0.2)
    assert fm.moe.train(third, loader(), 9, checkpoint=path, **options) == losses  # done already
    assert same(trained(whole), trained(third))


def test_a_constant_rate_is_trained_on_for_longer(tmp_path: Path) -> None:
    whole, part = llama(lora_dropout=0.1), llama(lora_dropout=0.1)
    losses = fm.moe.train(whole, loader(), 6, progress=False)
    fm.moe.train(part, loader(), 4, checkpoint=tmp_path / "c.pt", progress=False)
    again = llama(lora_dropout=0.1)
    assert fm.moe.train(again, loader(), 6, checkpoint=tmp_path / "c.pt", progress=False) == losses
    assert same(trained(whole), trained(again))


def test_seeds(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    runs = []
    for seed in (1, 1, 2):
        model = llama(lora_dropout=0.2)
        torch.set_rng_state(before)
        runs.append((fm.moe.train(model, batches(), 3, seed=seed, progress=False), trained(model)))
        assert torch.equal(torch.get_rng_state(), before)  # the caller's
        torch.rand(3)
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_only_what_is_trainable_moves() -> None:
    model = llama()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = trained(model)
    model.eval()
    fm.moe.train(model, batches(), 2, lr=1e-2, progress=False)
    assert not model.training
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    after = trained(model)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_accumulated_batches_count_equally() -> None:
    """Two batches of two windows are one of four, but for rounding (and the balance loss, which is no mean over windows)."""
    found = []
    for accumulate in (1, 2):
        pairs = batches(6)
        if accumulate == 1:
            joined = [torch.cat([a["input_ids"], b["input_ids"]]) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
            pairs = [{"input_ids": t, "labels": t} for t in joined]
        model = llama(balance_loss_coef=0.0)
        found.append(fm.moe.train(model, pairs, 3, lr=1e-3, accumulate=accumulate, progress=False))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][2] != pytest.approx(found[0][0], rel=1e-5)


def test_the_loss_holds_the_balance_loss() -> None:
    plain, balanced = (fm.moe.train(llama(balance_loss_coef=c), batches(), 1, progress=False)[0] for c in (0.0, 1.0))
    model = llama(balance_loss_coef=1.0)
    model(**batches()[0])
    assert balanced - plain == pytest.approx(fm.moe.aux_loss(model).item(), rel=1e-4)


def test_mixed_precision_keeps_parameters_in_float32() -> None:
    model = llama(lora_dropout=0.1)
    computed = []
    model.lm_head.register_forward_hook(lambda module, args, out: computed.append(out.dtype))
    losses = fm.moe.train(model, batches(1), 30, lr=1e-2, autocast=torch.bfloat16, progress=False)
    assert set(computed) == {torch.bfloat16}
    assert losses[-1] < losses[0] - 0.1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_gradients_are_averaged_and_clipped() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=(self.w * x).sum())

    with pytest.MonkeyPatch.context() as patch:
        seen = []
        inner = torch.optim.AdamW.step

        def step(self: Any, *args: Any) -> Any:
            seen.append(float(self.param_groups[0]["params"][0].grad.norm()))
            return inner(self, *args)

        patch.setattr(torch.optim.AdamW, "step", step)
        fm.moe.train(Scaled(), [{"x": torch.tensor([30.0, -40.0])}], 2, max_grad_norm=0.5, progress=False)
        fm.moe.train(Scaled(), [{"x": torch.tensor([30.0, -40.0])}], 1, max_grad_norm=None, accumulate=2, progress=False)
    assert seen == pytest.approx([0.5, 0.5, 50.0], rel=1e-4)  # accumulated batches are averaged, not summed


def test_learning_rate() -> None:
    assert [learning_rate(step, 100, 2.0, 4, 1.0) for step in (0, 1, 3, 4, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert learning_rate(0, 100, 2.0, 0, 0.1) == 2.0
    assert learning_rate(50, 100, 2.0, 0, 0.1) == pytest.approx(1.1)
    assert learning_rate(100, 100, 2.0, 0, 0.1) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"steps": 0}, ValueError),
        ({"steps": 2.0}, TypeError),
        ({"accumulate": 0}, ValueError),
        ({"lr": float("nan")}, ValueError),
        ({"lr": "fast"}, TypeError),
        ({"final_lr": -0.1}, ValueError),
        ({"weight_decay": -1.0}, ValueError),
        ({"max_grad_norm": -1.0}, ValueError),
        ({"seed": 1.5}, TypeError),
        ({"autocast": torch.float16}, ValueError),
        ({"batches": []}, ValueError),
        ({"batches": [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}]}, RuntimeError),  # no labels
        ({"batches": iter(batches(1)), "steps": 2}, ValueError),  # cannot be started again
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception]) -> None:
    given = {"model": llama(), "batches": batches(1), "steps": 1, "progress": False, **options}
    with pytest.raises(error) as raised:
        fm.moe.train(**given)
    assert isinstance(raised.value, fm.FusedMergeError)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = llama()
    with torch.no_grad():
        next(iter(fm.moe.structure(model).routers.values())).weight.fill_(float("nan"))
    with pytest.raises(fm.FusedMergeError, match="loss of step 0"):
        fm.moe.train(model, batches(), 1, progress=False)


def test_what_cannot_be_trained() -> None:
    with pytest.raises(fm.FusedMergeError, match="injected"):
        fm.moe.train(llama().requires_grad_(False), batches(), 1)
    unknown = fm.moe.inject(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), fm.moe.LoRAMoEConfig())  # which runs first?
    with pytest.raises(fm.FusedMergeError, match="run the model once"):
        fm.moe.train(unknown, batches(), 1)


def test_a_checkpoint_of_something_else_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    fm.moe.train(llama(), batches(), 2, checkpoint=path, progress=False)
    for model, options, what in (
        (llama(), {"lr": 1e-2}, "lr"),
        (llama(r=2), {}, "lora_A"),
        (llama(num_experts=2), {}, "lora_A"),
    ):
        before = trained(model)
        with pytest.raises(fm.FusedMergeError, match=what):
            fm.moe.train(model, batches(), 4, checkpoint=path, progress=False, **options)
        assert same(before, trained(model))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(fm.FusedMergeError, match=r"c\.pt"):
        fm.moe.train(llama(), batches(), 4, checkpoint=path, progress=False)
