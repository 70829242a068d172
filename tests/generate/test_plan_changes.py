"""Networks that the plan doesn't support, and networks that change after the plan was made."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pentad.generate.engine import Engine
from pentad.generate.guards import UnsupportedByKernels
from pentad.generate.plan_step import PlanStep, step_for
from pentad.generate.requests import Generation
from pentad.generate.sampling import Sampling
from pentad.generate.step import PlainStep
from pentad.nn.attention import Attention
from tests.helpers.programs import needs_kernels
from tests.helpers.steps import all_logits
from tests.helpers.tiny import assert_equal_logits, network_of, random_ids, tiny_checkpoint

pytestmark = needs_kernels


@pytest.fixture
def llama(tmp_path: Path) -> nn.Module:
    return network_of(tiny_checkpoint(tmp_path).folder)


def hook(network: nn.Module) -> None:
    network.layers[1].attention.q_proj.register_forward_hook(lambda part, inputs, y: 2 * y)


def pre_hook(network: nn.Module) -> None:
    network.norm.register_forward_pre_hook(lambda part, inputs: (2 * inputs[0],))


def adapter(network: nn.Module) -> None:
    network.layers[0].feedforward.up_proj = nn.Sequential(network.layers[0].feedforward.up_proj)


def subclass(network: nn.Module) -> None:
    class Louder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    network.head.__class__ = Louder


def forward(network: nn.Module) -> None:
    head = network.head
    network.head.forward = lambda x: 2 * nn.functional.linear(x, head.weight)


def new_attribute(network: nn.Module) -> None:
    network.layers[0].attention.softcap = 30.0


def double(network: nn.Module) -> None:
    network.layers[0].attention.o_proj.double()


@pytest.mark.parametrize("change", [hook, pre_hook, adapter, subclass, forward, new_attribute, double])
def test_unsupported_networks_have_no_plan(llama: nn.Module, change: Callable[[nn.Module], None]) -> None:
    change(llama)
    with pytest.raises(UnsupportedByKernels):
        PlanStep(llama)
    assert type(step_for(llama)) is PlainStep


@pytest.mark.parametrize("change", [hook, pre_hook, adapter, subclass, forward])
def test_a_change_during_a_request_falls_back_to_plain_torch(
    llama: nn.Module, change: Callable[[nn.Module], None]
) -> None:
    """The engine notices the change at its next check, and runs the request's tokens again."""
    engine = Engine(PlanStep(llama))
    request = generation(12)
    engine.submit(request)
    for _ in range(5):
        engine.step()
    change(llama)
    engine.refresh()
    while request.finish_reason is None:
        engine.step()
    assert type(engine.executor) is PlainStep
    assert len(request.generated) == 12
    ids = [*request.prompt, *request.generated]
    greedy = all_logits(PlainStep(llama), ids)[29:-1].argmax(1).tolist()
    assert greedy[5:] == request.generated[5:]


def generation(max_tokens: int) -> Generation:
    greedy = Sampling(temperature=0)
    return Generation(random_ids(30), sampling=greedy, generator=torch.Generator(), max_tokens=max_tokens)


def test_the_kernels_run_again_after_a_change_is_undone(llama: nn.Module) -> None:
    """The next request uses them after a hook, an adapter or a replaced forward is removed."""
    engine, layer = Engine(step_for(llama)), llama.layers[1]
    linear = layer.attention.q_proj
    steps = []
    for change in ("none", "hook", "none", "forward", "none", "adapter", "none"):
        handle = layer.register_forward_hook(lambda *_: None) if change == "hook" else None
        if change == "forward":
            layer.forward = layer.forward
        if change == "adapter":
            layer.attention.q_proj = nn.Sequential(linear)
        request = generation(3)
        engine.submit(request)
        while request.finish_reason is None:
            engine.step()
        steps.append(type(engine.executor))
        if handle is not None:
            handle.remove()
        vars(layer).pop("forward", None)
        layer.attention.q_proj = linear
    assert steps == [PlanStep, PlainStep, PlanStep, PlainStep, PlanStep, PlainStep, PlanStep]


@pytest.mark.parametrize("change", [hook, forward])
def test_each_request_checks_for_changes_when_it_begins(llama: nn.Module, change: Callable[[nn.Module], None]) -> None:
    engine = Engine(PlanStep(llama))
    for step in (PlanStep, PlainStep):
        request = generation(3)
        engine.submit(request)
        engine.step()
        assert type(engine.executor) is step
        engine.cancel(request)
        change(llama)


def replaced(network: nn.Module) -> None:
    weight = network.layers[0].feedforward.up_proj.weight
    network.layers[0].feedforward.up_proj.weight = nn.Parameter(2 * weight.detach())


def written(network: nn.Module) -> None:
    with torch.no_grad():
        network.layers[0].attention_norm.weight.mul_(3)


def narrowed(network: nn.Module) -> None:
    for part in network.modules():
        if isinstance(part, Attention):
            part.window = 7


@pytest.mark.parametrize("change", [replaced, written, narrowed])
def test_changed_weights_and_windows_give_a_new_plan(llama: nn.Module, change: Callable[[nn.Module], None]) -> None:
    ids, plan = random_ids(30), PlanStep(llama)
    before = all_logits(plan, ids)
    change(llama)
    again = plan.refresh()
    assert type(again) is PlanStep
    assert again is not plan
    assert_equal_logits(all_logits(again, ids), all_logits(PlainStep(llama), ids))
    assert not torch.allclose(all_logits(again, ids), before)
