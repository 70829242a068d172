"""The plan gives plain torch's logits, for every family, quantization, chunking and batch."""

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
from pentad.generate.guards import UnsupportedByKernels
from pentad.generate.plan_step import PlanStep, step_for
from pentad.generate.step import PlainStep, Step
from pentad.kernels import Program
from pentad.models import families
from pentad.nn.attention import Attention
from pentad.nn.linear import QuantizedEmbedding, QuantizedLinear
from pentad.nn.moe.dispatch import EvenCapacity
from pentad.nn.moe.routers import expert_choice
from tests.helpers.gguf_llama import write_gguf
from tests.helpers.programs import every_isa, needs_kernels
from tests.helpers.steps import all_logits
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


def test_every_family_is_tested() -> None:
    assert {name.split(",")[0] for name in FAMILIES} >= {f.names.family for f in families() if f.task == "language"} - {
        "switch_transformers"
    }


@pytest.fixture
def llama(tmp_path: Path) -> nn.Module:
    return network_of(tiny_checkpoint(tmp_path).folder)


MIXES = {
    **{name: (name, 64, {}) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    "Q4_K_M": ("Q4_K", 256, {"token_embd": "Q6_K", "attn_v": "Q6_K", "blk.0.ffn_down": "Q6_K"}),
    "Q5_K_M": ("Q5_K", 256, {"token_embd": "Q6_K", "attn_v": "Q6_K", "blk.0.ffn_down": "Q6_K"}),
    "Q4_K_M, odd sizes": ("Q5_0", 64, {"token_embd": "Q8_0", "attn_v": "Q8_0", "blk.0.ffn_down": "Q8_0"}),
}
"""llama.cpp's file types -> (the type of most matrices, a width of whole blocks, the types of other matrices)."""


@pytest.fixture(scope="module", params=[*MIXES, "mixtral", "phi"])
def quantized_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF whose matrices are all quantized, including embedding, head and experts; most heads are tied."""
    folder = tmp_path_factory.mktemp("quantized")
    path = folder / "tiny.gguf"
    if request.param in FAMILIES:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": request.param == "mixtral"}
        talking_checkpoint(folder / "floats", family=request.param, **sizes)
        convert(folder / "floats", path, to="gguf", quantize="q4_0")
        return path
    type_name, width, others = MIXES[request.param]
    peer = tiny_peer(hidden_size=width, intermediate_size=2 * width, tie_word_embeddings=True)
    with torch.no_grad():
        write_gguf(path, peer, type_name, other_types=others)
    return path


@pytest.fixture(scope="module")
def quantized(quantized_file: Path) -> nn.Module:
    return build(pentad.weights.open(quantized_file), quantized="all")


@every_isa
def test_float32_logits_equal_plain_torch(network: nn.Module, isa: str) -> None:
    ids = random_ids(90)
    plan = PlanStep(network, isa=isa)
    assert_equal_logits(all_logits(plan, ids), all_logits(PlainStep(network), ids))
    assert plan.refresh() is plan


def test_chunks_pages_threads_and_batches_do_not_change_the_bits(network: nn.Module) -> None:
    ids = random_ids(90)
    whole = all_logits(PlanStep(network), ids)
    for sizes, options in (
        ([1], {}),
        ([7, 30], {"page_size": 16}),
        ([64, 26], {"threads": 1}),
        ([40, 1], {"threads": 4}),
    ):
        assert torch.equal(all_logits(PlanStep(network, **options), ids, sizes), whole)
    plan = PlanStep(network)
    sequences = [plan.cache.open(90) for _ in range(3)]
    for start, stop in ((0, 50), (50, 51), (51, 90)):
        wanted = range(3 * (stop - start))
        y = plan([(sequence, ids[start:stop]) for sequence in sequences], wanted)
        for part in y.chunk(3):
            assert torch.equal(part, whole[start:stop])


def test_the_last_layer_computes_only_the_wanted_rows(network: nn.Module) -> None:
    ids, sizes = random_ids(90), (20, 30, 40)

    def run(step: Step, wanted: Sequence[Sequence[int]]) -> list[Tensor]:
        chunks = [ids[:20], ids[20:50], ids[50:]]
        sequences = [step.cache.open(90) for _ in range(2)]
        return [
            step([(sequence, chunk) for sequence in sequences], rows)
            for chunk, rows in zip(chunks, wanted, strict=True)
        ]

    few = [[19, 39], [], [79, 5, 6, 7, 39, 40, 79]]
    plan, plain = PlanStep(network), PlainStep(network)
    whole = run(plan, [range(2 * size) for size in sizes])
    for some, logits, rows in zip(run(plan, few), whole, few, strict=True):
        assert torch.equal(some, logits[rows])
    assert plan._plan.program._step.rows == 6, "the rows of the last layer"
    for some, logits, rows in zip(run(plain, few), whole, few, strict=True):
        if rows:
            assert_equal_logits(some, logits[rows])
    assert_equal_logits(plan.hidden_states(), plain.hidden_states())


def test_a_hook_in_the_last_layer_sees_all_rows(llama: nn.Module) -> None:
    seen, step = [], PlainStep(llama)
    step([(step.cache.open(9), random_ids(9))], [8])
    llama.layers[-1].register_forward_hook(lambda part, x, y: seen.append(len(y)))
    step([(step.cache.open(9), random_ids(9))], [8])
    assert seen == [9]


@pytest.mark.parametrize("window", [3, 20])
def test_windows(llama: nn.Module, window: int) -> None:
    """Pages outside the window are freed."""
    for part in llama.modules():
        if isinstance(part, Attention):
            part.window = window
    ids = random_ids(120)
    plan = PlanStep(llama, page_size=16)
    expected = all_logits(PlainStep(llama), ids)
    for sizes in ([1000], [1], [9, 1]):
        assert_equal_logits(all_logits(plan, ids, sizes), expected)
    sequence = plan.cache.open()
    for token in ids:
        plan([(sequence, [token])], [0])
    assert len(sequence.pages) <= window // 16 + 2


def test_forked_and_truncated_sequences(llama: nn.Module) -> None:
    ids, other = random_ids(40), random_ids(10, seed=5)
    plan = PlanStep(llama, page_size=16)
    first = plan.cache.open()
    plan([(first, ids[:20])], [])
    second = plan.cache.fork(first)
    y = plan([(first, ids[20:]), (second, other)], [19, 29])
    assert torch.equal(y[0], all_logits(plan, ids)[-1])
    assert torch.equal(y[1], all_logits(plan, ids[:20] + other)[-1])
    plan.cache.truncate(first, 5)
    assert torch.equal(plan([(first, other)], [9])[0], all_logits(plan, ids[:5] + other)[-1])


@every_isa
def test_quantized_weights(quantized: nn.Module, isa: str) -> None:
    """The default form is close to float32 on the same weights; the fast form is less accurate."""
    assert isinstance(quantized.head, QuantizedLinear)
    assert isinstance(quantized.embed, QuantizedEmbedding)
    ids = random_ids(90)
    exact = all_logits(PlainStep(quantized, cache_dtype=torch.float32), ids)
    plan = PlanStep(quantized, isa=isa)
    assert plan.cache.keys[0].dtype == torch.float16
    assert rms(all_logits(plan, ids) - exact) <= 2e-3 * rms(exact)
    assert_equal_logits(all_logits(PlanStep(quantized, isa=isa, cache_dtype=torch.float32), ids), exact, 1e-3)
    fast = all_logits(PlanStep(quantized, isa=isa, fast=True), ids)
    assert 2e-3 * rms(exact) <= rms(fast - exact) <= 0.1 * rms(exact)
    assert torch.equal(all_logits(plan, ids, [1, 5, 17]), all_logits(plan, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    """The plan computes in float32, so it is closer to float32 than torch."""
    folder = tiny_checkpoint(tmp_path, dtype=dtype).folder
    ids = random_ids(60)
    exact = all_logits(PlainStep(network_of(folder)), ids)
    assert_equal_logits(all_logits(PlanStep(network_of(folder, dtype), cache_dtype=torch.float32), ids), exact)
    assert rms(all_logits(PlanStep(network_of(folder, dtype), cache_dtype=dtype), ids) - exact) <= 0.02


@pytest.mark.parametrize("sizes", [[1000], [7, 30], [1]])
def test_capacities_depend_on_the_tokens_of_a_step(tmp_path: Path, sizes: list[int]) -> None:
    """OpenMoE's experts have a capacity in proportion to a sequence's tokens in the step."""
    network = network_of(openmoe_checkpoint(tmp_path, router_capacity_factor_eval=0.5).folder)
    plan, plain, ids = PlanStep(network), PlainStep(network), random_ids(90)
    assert_equal_logits(all_logits(plan, ids, sizes), all_logits(plain, ids, sizes))
    if sizes == [1000]:  # each sequence of a batch has its own capacity
        work = [ids[:40], ids[:3], ids[40:]]
        ours, theirs = (
            step([(step.cache.open(), part) for part in work], range(len(ids[:43] + ids[40:])))
            for step in (plan, plain)
        )
        assert_equal_logits(ours, theirs)
        for step in (plan, plain):  # the last layer's routing needs all rows
            assert_equal_logits(step([(step.cache.open(), ids)], [70]), all_logits(plain, ids)[70:71])
        assert plan._plan.program._step.rows == 90


def test_a_capacity_of_zero_is_refused(tmp_path: Path) -> None:
    network = network_of(openmoe_checkpoint(tmp_path).folder)
    network.layers[1].feedforward.capacity = EvenCapacity(0.1, 8, 0)
    for step in (PlanStep(network), PlainStep(network)):
        with pytest.raises(BadInput, match="capacity for 3 tokens is 0"):
            all_logits(step, [1, 2, 3])


def test_unsupported_mixtures_have_no_plan(tmp_path: Path) -> None:
    network = network_of(tiny_checkpoint(tmp_path, family="mixtral").folder)
    mixture = network.layers[1].feedforward
    for name, value in {"route": expert_choice, "group_size": 8, "training": True}.items():
        before = getattr(mixture, name)
        setattr(mixture, name, value)
        with pytest.raises(UnsupportedByKernels, match="mixture"):
            PlanStep(network)
        setattr(mixture, name, before)
    assert type(step_for(network)) is PlanStep


def test_an_int8_cache(llama: nn.Module) -> None:
    ids = random_ids(90)
    exact, plan = all_logits(PlainStep(llama), ids), PlanStep(llama, cache_dtype=torch.int8, page_size=16)
    y = all_logits(plan, ids)
    assert plan.cache.keys[0].dtype == torch.int8
    assert 1e-5 * rms(exact) <= rms(y - exact) <= 0.02 * rms(exact)
    assert torch.equal(all_logits(plan, ids, [1, 5, 17]), y)


def test_a_replaced_quantized_head_gives_a_new_plan(quantized: nn.Module) -> None:
    network = copy.deepcopy(quantized)
    plan, ids = PlanStep(network), random_ids(20)
    bias = network.head.bias
    network.head = QuantizedLinear(network.head.weight.rows(8, 40), bias if bias is None else bias[8:40])
    again = plan.refresh()
    assert again is not plan
    assert torch.equal(all_logits(again, ids), all_logits(plan, ids)[:, 8:40])


def test_a_quantized_file_is_loaded_with_its_plan(quantized_file: Path) -> None:
    assert type(pentad.load(quantized_file).step) is PlanStep


def test_without_kernels_it_is_plain_torch(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pentad.kernels.isas", dict)
    assert type(step_for(llama)) is PlainStep


def test_chat_logits_and_score_run_the_plan(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_smollm2_is_close_to_float32(smollm2: Path, fast: bool, bound: float) -> None:
    """Compares logits, the worst greedy token and perplexity; docs/benchmarks.md has the bounds."""
    exact, model = pentad.load(smollm2, quantize="none", dtype="float32"), pentad.load(smollm2, fast=fast)
    text = (Path(__file__).parents[2] / "LICENSE").read_text()[:1500]
    ids = model.tokenizer.encode(text)
    ours, theirs = model.logits(ids), exact.logits(ids)
    assert rms(ours - theirs) <= bound
    chosen = theirs.gather(1, ours.argmax(1)[:, None])[:, 0]
    assert float((theirs.amax(1) - chosen).max()) <= (0.75 if fast else 0.1)
    assert model.score(text).perplexity == pytest.approx(exact.score(text).perplexity, rel=0.01 if fast else 0.001)
