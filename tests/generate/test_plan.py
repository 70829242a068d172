"""The plan: equal to plain torch wherever it runs, and not used where it would not be."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pentad
from pentad.generate.engine import Engine, Request
from pentad.generate.plan import NotDerivable, PlanStep, step_for
from pentad.generate.sampling import Sampling
from pentad.generate.step import PlainStep, Step
from pentad.kernels import Program
from pentad.loading import load_network
from pentad.nn.attention import Attention
from pentad.nn.linear import QuantizedEmbedding, QuantizedLinear
from tests.helpers.gguf_llama import write_gguf
from tests.helpers.programs import every_isa, needs_kernels
from tests.helpers.tiny import assert_equal_logits, network_of, random_ids, rms, tiny_checkpoint, tiny_peer

pytestmark = needs_kernels
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, with biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "odd sizes": {"hidden_size": 36, "intermediate_size": 50, "vocab_size": 97, "num_attention_heads": 6},
    "dynamic RoPE": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
}


@pytest.fixture(scope="module", params=FAMILIES)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return network_of(tiny_checkpoint(tmp_path_factory.mktemp("family"), **FAMILIES[request.param]).folder)


@pytest.fixture
def llama(tmp_path: Path) -> nn.Module:
    return network_of(tiny_checkpoint(tmp_path).folder)


@pytest.fixture(scope="module", params=["Q4_0", "Q4_1", "Q8_0"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """All matrices in blocks, embedding and head too, which are tied."""
    path = tmp_path_factory.mktemp("quantized") / "tiny.gguf"
    peer = tiny_peer(hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    with torch.no_grad():
        write_gguf(path, peer, request.param)
    return load_network(pentad.weights.open(path), blocks=True)


def runs_of(step: Step, ids: Sequence[int], sizes: Sequence[int] = (1000,)) -> Tensor:
    """All logits of one sequence, in chunks of these sizes in turn."""
    sequence, out, at = step.cache.open(len(ids)), [], 0
    for i in range(len(ids)):
        chunk = ids[at : at + sizes[i % len(sizes)]]
        if not chunk:
            break
        out.append(step([(sequence, chunk)], range(len(chunk))))
        at += len(chunk)
    step.cache.close(sequence)
    return torch.cat(out)


@every_isa
def test_equals_plain_torch(network: nn.Module, isa: str) -> None:
    """In float32, where the plan did run."""
    ids = random_ids(90)
    plan = PlanStep(network, isa=isa)
    assert_equal_logits(runs_of(plan, ids), runs_of(PlainStep(network), ids))
    assert plan.renewed() is plan


def test_cut_as_you_like_it_is_the_same_bits(network: nn.Module) -> None:
    ids = random_ids(90)
    whole = runs_of(PlanStep(network), ids)
    for sizes, options in (
        ([1], {}),
        ([7, 30], {"page_size": 16}),
        ([64, 26], {"threads": 1}),
        ([40, 1], {"threads": 4}),
    ):
        assert torch.equal(runs_of(PlanStep(network, **options), ids, sizes), whole)
    plan = PlanStep(network)
    sequences = [plan.cache.open(90) for _ in range(3)]
    for start, stop in ((0, 50), (50, 51), (51, 90)):
        wanted = range(3 * (stop - start))
        y = plan([(sequence, ids[start:stop]) for sequence in sequences], wanted)
        for part in y.chunk(3):
            assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("window", [3, 20])
def test_windows(llama: nn.Module, window: int) -> None:
    """Pages that leave the window are taken back."""
    for part in llama.modules():
        if isinstance(part, Attention):
            part.window = window
    ids = random_ids(120)
    plan = PlanStep(llama, page_size=16)
    expected = runs_of(PlainStep(llama), ids)
    for sizes in ([1000], [1], [9, 1]):
        assert_equal_logits(runs_of(plan, ids, sizes), expected)
    sequence = plan.cache.open()
    for token in ids:
        plan([(sequence, [token])], [0])
    assert len(sequence.pages) <= window // 16 + 2


def test_branches_of_a_sequence(llama: nn.Module) -> None:
    """Shared pages, and a sequence that goes back."""
    ids, other = random_ids(40), random_ids(10, seed=5)
    plan = PlanStep(llama, page_size=16)
    first = plan.cache.open()
    plan([(first, ids[:20])], [])
    second = plan.cache.fork(first)
    y = plan([(first, ids[20:]), (second, other)], [19, 29])
    assert torch.equal(y[0], runs_of(plan, ids)[-1])
    assert torch.equal(y[1], runs_of(plan, ids[:20] + other)[-1])
    plan.cache.truncate(first, 5)
    assert torch.equal(plan([(first, other)], [9])[0], runs_of(plan, ids[:5] + other)[-1])


@every_isa
def test_quantized_weights(quantized: nn.Module, isa: str) -> None:
    """Near float32 on the same weights: exactly by default, roughly when fast."""
    assert isinstance(quantized.head, QuantizedLinear)
    assert isinstance(quantized.embed, QuantizedEmbedding)
    ids = random_ids(90)
    exact = runs_of(PlainStep(quantized, cache_dtype=torch.float32), ids)
    plan = PlanStep(quantized, isa=isa)
    assert plan.cache.keys[0].dtype == torch.float16
    assert rms(runs_of(plan, ids) - exact) <= 2e-3 * rms(exact)
    assert_equal_logits(runs_of(PlanStep(quantized, isa=isa, cache_dtype=torch.float32), ids), exact, 1e-3)
    rough = runs_of(PlanStep(quantized, isa=isa, fast=True), ids)
    assert 2e-3 * rms(exact) <= rms(rough - exact) <= 0.1 * rms(exact)
    assert torch.equal(runs_of(plan, ids, [1, 5, 17]), runs_of(plan, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    """The plan computes in float32 with them, so it is nearer to float32 than torch."""
    folder = tiny_checkpoint(tmp_path, dtype=dtype).folder
    ids = random_ids(60)
    exact = runs_of(PlainStep(network_of(folder)), ids)
    assert_equal_logits(runs_of(PlanStep(network_of(folder, dtype)), ids), exact)
    assert rms(runs_of(PlanStep(network_of(folder, dtype), cache_dtype=dtype), ids) - exact) <= 0.02


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
def test_what_is_not_known_has_no_plan(llama: nn.Module, change: Callable[[nn.Module], None]) -> None:
    change(llama)
    with pytest.raises(NotDerivable):
        PlanStep(llama)
    assert type(step_for(llama)) is PlainStep


@pytest.mark.parametrize("change", [hook, pre_hook, adapter])
def test_what_is_changed_later_runs_as_plain_torch(llama: nn.Module, change: Callable[[nn.Module], None]) -> None:
    """In the middle of a text: what was cached is run again."""
    engine = Engine(PlanStep(llama))
    request = Request(random_ids(30), Sampling(temperature=0), torch.Generator(), max_tokens=10)
    engine.submit(request)
    for _ in range(5):
        engine.step()
    change(llama)
    assert len(request.generated) == 5
    while request.finish_reason is None:
        engine.step()
    assert type(engine.run) is PlainStep
    assert len(request.generated) == 10
    ids = [*request.prompt, *request.generated]
    assert runs_of(PlainStep(llama), ids)[34:-1].argmax(1).tolist() == request.generated[5:]


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
def test_what_is_replaced_is_not_read_any_more(llama: nn.Module, change: Callable[[nn.Module], None]) -> None:
    ids, plan = random_ids(30), PlanStep(llama)
    before = runs_of(plan, ids)
    change(llama)
    again = plan.renewed()
    assert type(again) is PlanStep
    assert again is not plan
    assert_equal_logits(runs_of(again, ids), runs_of(PlainStep(llama), ids))
    assert not torch.allclose(runs_of(again, ids), before)


def test_replaced_blocks(quantized: nn.Module) -> None:
    network = copy.copy(quantized)
    network._modules = dict(quantized._modules)
    plan, ids = PlanStep(network), random_ids(20)
    network.head = QuantizedLinear(network.head.weight.rows(8, 40))
    again = plan.renewed()
    assert again is not plan
    assert torch.equal(runs_of(again, ids), runs_of(plan, ids)[:, 8:40])


def test_without_kernels_it_is_plain_torch(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pentad.kernels.isas", dict)
    assert type(step_for(llama)) is PlainStep


def test_a_loaded_model_runs_by_its_plan(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda self, *arguments: ran.append(1) or run(self, *arguments))
    model = pentad.load(smollm2)
    assert "Paris" in model.chat("What is the capital of France?", temperature=0, max_tokens=10).text
    assert len(ran) >= 7
    model.logits([1, 2, 3])
    model.score("one two three")
    assert len(ran) >= 9
    assert type(pentad.load(smollm2, quantize="none").step) is PlainStep


@pytest.mark.parametrize(("fast", "bound"), [(False, 0.02), (True, 0.2)])
def test_the_real_model_is_near_float32(smollm2: Path, fast: bool, bound: float) -> None:
    """The lines "exact" and "stock" of the design: logits, the worst greedy token, perplexity."""
    exact, model = pentad.load(smollm2, quantize="none", dtype="float32"), pentad.load(smollm2, fast=fast)
    text = (Path(__file__).parents[2] / "LICENSE").read_text()[:1500]
    ids = model.tokenizer.encode(text)
    ours, theirs = model.logits(ids), exact.logits(ids)
    assert rms(ours - theirs) <= bound
    chosen = theirs.gather(1, ours.argmax(1)[:, None])[:, 0]
    assert float((theirs.amax(1) - chosen).max()) <= (0.75 if fast else 0.1)
    assert model.score(text).perplexity == pytest.approx(exact.score(text).perplexity, rel=0.01 if fast else 0.001)
