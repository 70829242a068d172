"""The plan: equal to plain torch wherever it runs, and not used where it would not be."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pentad
from pentad.build import build
from pentad.convert import convert
from pentad.errors import BadInput
from pentad.generate.engine import Engine, Generation
from pentad.generate.guards import UnsupportedByKernels
from pentad.generate.plan_step import PlanStep, step_for
from pentad.generate.sampling import Sampling
from pentad.generate.step import PlainStep, Step
from pentad.kernels import Program
from pentad.models import families
from pentad.nn.attention import Attention
from pentad.nn.linear import QuantizedEmbedding, QuantizedLinear
from pentad.nn.moe.dispatch import EvenCapacity
from pentad.nn.moe.routers import expert_choice
from tests.helpers.gguf_llama import write_gguf
from tests.helpers.programs import every_isa, needs_kernels
from tests.helpers.tiny import (
    assert_equal_logits,
    network_of,
    random_ids,
    rms,
    talking_checkpoint,
    tiny_checkpoint,
    tiny_peer,
)
from tests.helpers.tiny_openmoe import openmoe_checkpoint
from tests.helpers.tiny_qwen import qwen_checkpoint

pytestmark = needs_kernels
FAMILIES: dict[str, Callable[[Path], Any]] = {
    "llama": tiny_checkpoint,
    "llama, tied, with biases": partial(tiny_checkpoint, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": partial(tiny_checkpoint, family="mistral", sliding_window=20),
    "qwen": qwen_checkpoint,
    "qwen, past its length": partial(qwen_checkpoint, use_logn_attn=True, use_dynamic_ntk=True),
    "qwen2": partial(tiny_checkpoint, family="qwen2"),
    "qwen3": partial(tiny_checkpoint, family="qwen3", head_dim=16),
    "phi": partial(tiny_checkpoint, family="phi"),
    "phi, norms of queries": partial(tiny_checkpoint, family="phi", qk_layernorm=True, partial_rotary_factor=0.75),
    "mixtral": partial(tiny_checkpoint, family="mixtral", num_local_experts=5, num_experts_per_tok=2),
    "mixtral, one expert": partial(tiny_checkpoint, family="mixtral", num_local_experts=3, num_experts_per_tok=1),
    "openmoe": partial(openmoe_checkpoint, router_drop_tks=False),
    "odd sizes": partial(tiny_checkpoint, hidden_size=36, intermediate_size=50, vocab_size=97, num_attention_heads=6),
    "dynamic RoPE": partial(
        tiny_checkpoint, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return network_of(FAMILIES[request.param](tmp_path_factory.mktemp("family")).folder)


def test_there_is_one_of_each_family() -> None:
    assert {name.split(",")[0] for name in FAMILIES} >= {family.names.family for family in families()} - {
        "switch_transformers"
    }


@pytest.fixture
def llama(tmp_path: Path) -> nn.Module:
    return network_of(tiny_checkpoint(tmp_path).folder)


MIXES = {
    **{kind: (kind, 64, {}) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    "Q4_K_M": ("Q4_K", 256, {"token_embd": "Q6_K", "attn_v": "Q6_K", "blk.0.ffn_down": "Q6_K"}),
    "Q5_K_M": ("Q5_K", 256, {"token_embd": "Q6_K", "attn_v": "Q6_K", "blk.0.ffn_down": "Q6_K"}),
    "Q4_K_M, odd sizes": ("Q5_0", 64, {"token_embd": "Q8_0", "attn_v": "Q8_0", "blk.0.ffn_down": "Q8_0"}),
}
"""What llama.cpp's files of that name have: most matrices' kind, a width that it fits, kinds of some others."""


@pytest.fixture(scope="module", params=[*MIXES, "mixtral", "phi"])
def quantized_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All matrices in blocks, embedding and head too, which are mostly tied; a mixture's experts."""
    folder = tmp_path_factory.mktemp("quantized")
    path = folder / "tiny.gguf"
    if request.param in FAMILIES:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": request.param == "mixtral"}
        talking_checkpoint(folder / "floats", family=request.param, **sizes)
        convert(folder / "floats", path, to="gguf", quantize="q4_0")
        return path
    kind, width, others = MIXES[request.param]
    peer = tiny_peer(hidden_size=width, intermediate_size=2 * width, tie_word_embeddings=True)
    with torch.no_grad():
        write_gguf(path, peer, kind, other_types=others)
    return path


@pytest.fixture(scope="module")
def quantized(quantized_file: Path) -> nn.Module:
    return build(pentad.weights.open(quantized_file), quantized="all")


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
    assert plan.refresh() is plan


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
    assert_equal_logits(runs_of(PlanStep(network_of(folder, dtype), cache_dtype=torch.float32), ids), exact)
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
    with pytest.raises(UnsupportedByKernels):
        PlanStep(llama)
    assert type(step_for(llama)) is PlainStep


@pytest.mark.parametrize("change", [hook, pre_hook, adapter, subclass, forward])
def test_what_is_changed_later_runs_as_plain_torch(llama: nn.Module, change: Callable[[nn.Module], None]) -> None:
    """In the middle of a text, once it is looked for: the tokens so far are run again."""
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
    likeliest = runs_of(PlainStep(llama), ids)[29:-1].argmax(1).tolist()
    assert likeliest[5:] == request.generated[5:]


def generation(max_tokens: int) -> Generation:
    greedy = Sampling(temperature=0)
    return Generation(random_ids(30), sampling=greedy, generator=torch.Generator(), max_tokens=max_tokens)


def test_the_kernels_come_back_when_a_hook_is_removed(llama: nn.Module) -> None:
    """Or an adapter, or a replaced forward: at the next request."""
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
def test_a_request_begins_with_the_network_as_it_is(llama: nn.Module, change: Callable[[nn.Module], None]) -> None:
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
def test_what_is_replaced_is_not_read_any_more(llama: nn.Module, change: Callable[[nn.Module], None]) -> None:
    ids, plan = random_ids(30), PlanStep(llama)
    before = runs_of(plan, ids)
    change(llama)
    again = plan.refresh()
    assert type(again) is PlanStep
    assert again is not plan
    assert_equal_logits(runs_of(again, ids), runs_of(PlainStep(llama), ids))
    assert not torch.allclose(runs_of(again, ids), before)


@pytest.mark.parametrize("sizes", [[1000], [7, 30], [1]])
def test_capacities_are_those_of_a_step(tmp_path: Path, sizes: list[int]) -> None:
    """OpenMoE: how many tokens an expert takes depends on the tokens of the step."""
    network = network_of(openmoe_checkpoint(tmp_path, router_capacity_factor_eval=0.5).folder)
    plan, plain, ids = PlanStep(network), PlainStep(network), random_ids(90)
    assert_equal_logits(runs_of(plan, ids, sizes), runs_of(plain, ids, sizes))
    if sizes == [1000]:  # each of several sequences has its own
        work = [ids[:40], ids[:3], ids[40:]]
        ours, theirs = (
            step([(step.cache.open(), part) for part in work], range(len(ids[:43] + ids[40:])))
            for step in (plan, plain)
        )
        assert_equal_logits(ours, theirs)


def test_an_expert_takes_at_least_one_token(tmp_path: Path) -> None:
    network = network_of(openmoe_checkpoint(tmp_path).folder)
    network.layers[1].feedforward.capacity = EvenCapacity(0.1, 8, 0)
    for step in (PlanStep(network), PlainStep(network)):
        with pytest.raises(BadInput, match="capacity for 3 tokens is 0"):
            runs_of(step, [1, 2, 3])


def test_mixtures_that_are_not_known(tmp_path: Path) -> None:
    network = network_of(tiny_checkpoint(tmp_path, family="mixtral").folder)
    mixture = network.layers[1].feedforward
    for name, value in {"route": expert_choice, "group_size": 8, "training": True}.items():
        before = getattr(mixture, name)
        setattr(mixture, name, value)
        with pytest.raises(UnsupportedByKernels, match="mixture"):
            PlanStep(network)
        setattr(mixture, name, before)
    assert type(step_for(network)) is PlanStep


def test_a_cache_of_bytes(llama: nn.Module) -> None:
    ids = random_ids(90)
    exact, plan = runs_of(PlainStep(llama), ids), PlanStep(llama, cache_dtype=torch.int8, page_size=16)
    y = runs_of(plan, ids)
    assert plan.cache.keys[0].dtype == torch.int8
    assert 1e-5 * rms(exact) <= rms(y - exact) <= 0.02 * rms(exact)
    assert torch.equal(runs_of(plan, ids, [1, 5, 17]), y)


def test_replaced_blocks(quantized: nn.Module) -> None:
    network = copy.deepcopy(quantized)
    plan, ids = PlanStep(network), random_ids(20)
    bias = network.head.bias
    network.head = QuantizedLinear(network.head.weight.rows(8, 40), bias if bias is None else bias[8:40])
    again = plan.refresh()
    assert again is not plan
    assert torch.equal(runs_of(again, ids), runs_of(plan, ids)[:, 8:40])


def test_a_quantized_file_is_loaded_with_its_plan(quantized_file: Path) -> None:
    assert type(pentad.load(quantized_file).step) is PlanStep


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
