"""Gradients of every family against transformers, of packed against separate documents, of two processes and one."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import pentad.weights
from pentad.build import build
from pentad.nn.batch import Batch, SequenceLayout, pack
from pentad.nn.moe.layer import MixtureOfExperts
from tests.helpers.tiny import Tiny, random_ids, tiny_checkpoint
from tests.helpers.tiny_openmoe import openmoe_checkpoint
from tests.helpers.tiny_qwen import qwen_checkpoint, qwen_state
from tests.helpers.tiny_switch import switch_checkpoint

DOCUMENTS = [random_ids(17, seed=1), random_ids(29, seed=2), random_ids(6, seed=3)]
SOURCES = [random_ids(11, seed=4), random_ids(23, seed=5), random_ids(7, seed=6)]
CHECKPOINTS: dict[str, Callable[[Path], Tiny]] = {
    "llama": tiny_checkpoint,
    "llama, tied": lambda folder: tiny_checkpoint(folder, tie_word_embeddings=True),
    "mistral, window": lambda folder: tiny_checkpoint(folder, family="mistral", sliding_window=5),
    "qwen2": lambda folder: tiny_checkpoint(folder, family="qwen2"),
    "qwen3": lambda folder: tiny_checkpoint(folder, family="qwen3"),
    "phi": lambda folder: tiny_checkpoint(folder, family="phi"),
    "mixtral": lambda folder: tiny_checkpoint(folder, family="mixtral"),
    "qwen": qwen_checkpoint,
}


def losses(network: nn.Module, documents: list[list[int]], checkpointing: str = "none") -> list[Tensor]:
    """The summed cross-entropy of each document's next tokens, all packed into one batch."""
    ids, batch = pack(*documents)
    logits = network.head(network(ids, batch, checkpointing=checkpointing)).float()
    parts = logits.split([len(document) for document in documents])
    return [
        F.cross_entropy(part[:-1], torch.tensor(document[1:]), reduction="sum")
        for part, document in zip(parts, documents, strict=True)
    ]


def gradients(network: nn.Module, backward: Callable[[], object]) -> dict[str, Tensor]:
    """Each parameter's gradient after `backward`."""
    network.zero_grad()
    backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}


def peer_gradients(tiny: Tiny, folder: Path, name: str) -> dict[str, Tensor]:
    """transformers' gradients by pentad's names: saved as a checkpoint, and loaded with pentad."""
    peer = tiny.peer
    for document in DOCUMENTS:
        logits = peer(input_ids=torch.tensor([document]), use_cache=False).logits[0]
        F.cross_entropy(logits[:-1], torch.tensor(document[1:]), reduction="sum").backward()
    return saved_gradients(tiny, folder, qwen_state if name == "qwen" else None)


def saved_gradients(tiny: Tiny, folder: Path, rename: Any = None) -> dict[str, Tensor]:
    shutil.copytree(tiny.folder, folder)
    if rename is None:
        with torch.no_grad():
            for parameter in tiny.peer.parameters():
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        tiny.peer.save_pretrained(folder)
    else:
        save_file(rename({n: p.grad for n, p in tiny.peer.named_parameters()}), folder / "model.safetensors")
    return {name: p.detach() for name, p in build(pentad.weights.open(folder)).named_parameters()}


def assert_equal_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert float((gradient - theirs[name]).norm()) <= tolerance * float(theirs[name].norm()) + 1e-7, name
    assert any(float(gradient.norm()) > 0.1 for gradient in ours.values())


def trainable(folder: Path) -> nn.Module:
    """Load a trainable network in evaluation mode, as the peer is, so that nothing is random."""
    return build(pentad.weights.open(folder), trainable=True).eval()


# --- against transformers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_gradients_equal_transformers(tmp_path: Path, name: str) -> None:
    tiny = CHECKPOINTS[name](tmp_path / "model")
    network = trainable(tmp_path / "model")
    expected = peer_gradients(tiny, tmp_path / "gradients", name)
    plain = gradients(network, lambda: sum(losses(network, DOCUMENTS)).backward())  # type: ignore[union-attr]
    assert_equal_gradients(plain, expected)
    checkpointed = gradients(network, lambda: sum(losses(network, DOCUMENTS, "blocks")).backward())  # type: ignore[union-attr]
    assert_equal_gradients(checkpointed, expected)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo warns after a graph break
@pytest.mark.parametrize(
    ("name", "checkpointing"), [*((name, "none") for name in CHECKPOINTS), ("llama", "blocks"), ("mixtral", "blocks")]
)
def test_compiled_gradients_equal_transformers(tmp_path: Path, name: str, checkpointing: str) -> None:
    tiny = CHECKPOINTS[name](tmp_path / "model")
    network = trainable(tmp_path / "model")
    expected = peer_gradients(tiny, tmp_path / "gradients", name)
    torch.compiler.reset()
    compiled = torch.compile(network, dynamic=True, backend="aot_eager")

    def backward() -> None:
        ids, batch = packed(DOCUMENTS)
        logits = network.head(compiled(ids, batch, checkpointing=checkpointing))
        targets = torch.tensor([token for document in DOCUMENTS for token in [*document[1:], -100]])
        F.cross_entropy(logits, targets, reduction="sum").backward()

    assert_equal_gradients(gradients(network, backward), expected)


def packed(documents: list[list[int]]) -> tuple[Tensor, Batch]:
    """Pack documents from a tensor of cu_seqlens, as training does."""
    bounds = torch.tensor([0, *[len(document) for document in documents]]).cumsum(0)
    return pack(*documents)[0], Batch.packed(bounds.int())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("checkpointing", "compiled"), [("none", False), ("blocks", False), ("none", True)])
def test_gradients_of_an_encoder_decoder(tmp_path: Path, checkpointing: str, compiled: bool) -> None:
    tiny = switch_checkpoint(tmp_path / "model")
    network = trainable(tmp_path / "model")
    for source, document in zip(SOURCES, DOCUMENTS, strict=True):
        out = tiny.peer(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([document]), use_cache=False)
        F.cross_entropy(out.logits[0][:-1], torch.tensor(document[1:]), reduction="sum").backward()
    expected = saved_gradients(tiny, tmp_path / "gradients")
    encode, decode = network.encode, network.forward
    if compiled:
        torch.compiler.reset()
        encode, decode = (torch.compile(part, dynamic=True, backend="aot_eager") for part in (encode, decode))

    def backward() -> None:
        hidden, _ = encode(*pack(*SOURCES), checkpointing=checkpointing)
        ids, batch = pack(*DOCUMENTS)
        batch = replace(batch, context=SequenceLayout.of([len(source) for source in SOURCES]))
        logits = network.head(decode(ids, batch, hidden, checkpointing=checkpointing))
        targets = torch.tensor([token for document in DOCUMENTS for token in [*document[1:], -100]])
        F.cross_entropy(logits, targets, reduction="sum").backward()

    assert_equal_gradients(gradients(network, backward), expected)


def test_openmoe_gradients_match_finite_differences(tmp_path: Path) -> None:
    """transformers has no OpenMoE, so the gradient is compared with central differences along it, in float64."""
    openmoe_checkpoint(tmp_path, router_drop_tks=False)
    network = trainable(tmp_path)
    found = gradients(network, lambda: sum(losses(network, DOCUMENTS)).backward())  # type: ignore[union-attr]
    checkpointed = gradients(network, lambda: sum(losses(network, DOCUMENTS, "blocks")).backward())  # type: ignore[union-attr]
    assert_equal_gradients(checkpointed, found)
    size = sum(float(gradient.square().sum()) for gradient in found.values()) ** 0.5
    step, network = 1e-4, network.double()
    network.residual_dtype = torch.float64

    def loss_at(distance: float) -> float:
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.add_(found[name].double(), alpha=distance / size)
            return float(sum(losses(network, DOCUMENTS)))

    slope = (loss_at(step) - loss_at(-2 * step)) / (2 * step)
    assert slope == pytest.approx(size, rel=2e-3)


# --- packed documents ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_packed_gradients_are_the_sum_of_separate_ones(tmp_path: Path, name: str) -> None:
    CHECKPOINTS[name](tmp_path)
    network = trainable(tmp_path)
    packed_gradients = gradients(network, lambda: sum(losses(network, DOCUMENTS)).backward())  # type: ignore[union-attr]

    def separately() -> None:
        for document in DOCUMENTS:
            losses(network, [document])[0].backward()

    separate_gradients = gradients(network, separately)
    largest = max(float(gradient.abs().max()) for gradient in separate_gradients.values())
    for parameter, gradient in packed_gradients.items():
        assert float((gradient - separate_gradients[parameter]).abs().max()) <= 1e-6 * largest, parameter


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_document_does_not_change_the_bits_of_others(tmp_path: Path, name: str) -> None:
    CHECKPOINTS[name](tmp_path)
    network = trainable(tmp_path)
    first = losses(network, DOCUMENTS)
    second = losses(network, [DOCUMENTS[0], random_ids(29, seed=9), DOCUMENTS[2]])
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


def test_five_packings_compile_at_most_twice(tmp_path: Path) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    tiny_checkpoint(tmp_path)
    network = trainable(tmp_path)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, dynamic=True, fullgraph=True, backend=counter)
    for lengths in ([5, 9, 3], [7, 7], [20], [1, 2, 3, 4, 5], [30, 2, 11, 6]):
        ids, batch = packed([random_ids(length) for length in lengths])
        hidden = compiled(ids, batch)
        torch.testing.assert_close(hidden, network(ids, batch), rtol=1e-5, atol=1e-5)
        hidden.sum().backward()
    assert 1 <= counter.frame_count <= 2


def test_checkpointing_repeats_a_routers_noise(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, family="mixtral")
    network, found = trainable(tmp_path).train(), []
    mixtures = [part for part in network.modules() if isinstance(part, MixtureOfExperts)]
    for checkpointing in ("none", "blocks"):
        generator = torch.Generator().manual_seed(0)
        for part in mixtures:
            part.generator, part.jitter = generator, 0.5
        found.append(gradients(network, lambda mode=checkpointing: sum(losses(network, DOCUMENTS, mode)).backward()))  # type: ignore[misc, union-attr]
        found[-1]["next"] = torch.rand(1, generator=generator)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
    assert len(mixtures) > 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_residual_stream_has_residual_dtype(tmp_path: Path, family: str) -> None:
    tiny_checkpoint(tmp_path, family=family)
    network, seen = trainable(tmp_path), []
    for part in (*network.layers, network.norm):
        part.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    whole = network(*pack(DOCUMENTS[0]))
    network.residual_dtype = torch.bfloat16
    rounded = network(*pack(DOCUMENTS[0]))
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3
    assert 0 < float((whole - rounded).norm()) < 0.05 * float(whole.norm())


def test_an_unknown_checkpointing_mode_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="checkpointing is 'layers'"):
        trainable(tmp_path)(*pack([1, 2]), checkpointing="layers")


def test_checkpointing_saves_fewer_bytes_for_the_backward_pass(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    network, kept = trainable(tmp_path), {}
    for checkpointing in ("none", "blocks"):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.nbytes) or x, lambda x: x):
            losses(network, DOCUMENTS, checkpointing)
        kept[checkpointing] = sum(saved)
    assert kept["blocks"] < kept["none"] / 2


# --- two processes ------------------------------------------------------------------------------------


def sharded_step(rank: int, folder: str, out: str) -> None:
    """One of two processes: a step of SGD on its half of the documents, with a network that FSDP2 shards."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    network = trainable(Path(folder))
    mesh = init_device_mesh("cpu", (2,))
    for block in network.layers:
        fully_shard(block, mesh=mesh)
    fully_shard([network.embed, network.norm, network.head], mesh=mesh)
    fully_shard(network, mesh=mesh)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    mine = DOCUMENTS[:1] if rank == 0 else DOCUMENTS[1:]
    loss = sum(losses(network, mine))
    assert isinstance(loss, Tensor)
    (2 * loss).backward()  # FSDP averages over processes; the reference sums
    total = loss.detach().clone()
    dist.all_reduce(total)
    optimizer.step()
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in network.named_parameters()}
    torch.save({"loss": total, **{name: p.detach().clone() for name, p in whole.items()}}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_a_sharded_step_of_two_processes_equals_one_process(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    torch.multiprocessing.spawn(sharded_step, (str(tmp_path / "model"), str(tmp_path)), nprocs=2)
    network = trainable(tmp_path / "model")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    loss = sum(losses(network, DOCUMENTS))
    loss.backward()  # type: ignore[union-attr]
    optimizer.step()
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(shared["loss"], loss.detach(), rtol=1e-6, atol=0)  # type: ignore[union-attr]
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(shared[name], parameter.detach(), rtol=1e-5, atol=1e-5)
