"""Vision against its peers, interleaved, each with the same answers: python benchmarks/vision.py [nms …].

vit, mae, mask-rcnn: processor time of one thread; mask-rcnn needs Debian's torchvision, too.
nms: pentad's NMS and RoIAlign against torchvision's C++. They need a torchvision whose operators load in this
interpreter, or Debian's (apt install python3-torchvision), which --peer /usr/bin/python3 runs in a process of its own.
darknet: Darknet networks (--cfg NAME …) against OpenCV, onnxruntime (needs onnx) and ncnn (needs pnnx), if installed.
scenes: how long a composed scene takes.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from results import report
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

# What the peer's process does: a line of standard input names a case, and the seconds are its answer.
PEER = """
import json, sys, time, torch, torchvision
torch.set_num_threads(int(sys.argv[2]))
cases = torch.load(sys.argv[1])
print(json.dumps(f"torchvision {torchvision.__version__}"), flush=True)
for line in sys.stdin:
    operator, *arguments = cases[line.strip()]
    start = time.perf_counter()
    result = getattr(torchvision.ops, operator)(*arguments)
    seconds = time.perf_counter() - start
    torch.save(result, sys.argv[1] + ".result")
    print(json.dumps(seconds), flush=True)
"""


# Mask R-CNN in the peer's process: its weights are saved first; each line asks for a forward pass or a training step.
MASK_RCNN_PEER = """
import json, sys, time, torch, torchvision
torch.set_num_threads(1)
torch.manual_seed(0)
folder = sys.argv[1]
model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
for block in [*model.backbone.body.modules()]:
    if hasattr(block, "bn3"):
        block.bn3.weight.data.fill_(0.2)  # so that random activations stay small
model.roi_heads.box_predictor.cls_score.weight.data.mul_(30)  # so that something is found
torch.save(model.state_dict(), folder + "/rcnn.pth")
print(json.dumps(f"torchvision {torchvision.__version__}, torch {torch.__version__}"), flush=True)
case = torch.load(folder + "/case.pt")
for line in sys.stdin:
    start = time.process_time()
    if line.strip() == "forward":
        with torch.no_grad():
            result = model.eval()([case["image"]])[0]
    else:
        losses = model.train()([case["image"]], [case["target"]])
        sum(losses.values()).backward()
        model.zero_grad()
        result = {name: loss.detach() for name, loss in losses.items()}
    seconds = time.process_time() - start
    torch.save(result, folder + "/result.pt")
    print(json.dumps(seconds), flush=True)
"""


class Peer:
    """torchvision in a process of its own."""

    def __init__(self, python: str, cases: dict[str, tuple], threads: int, folder: str) -> None:
        self.path = f"{folder}/cases.pt"
        torch.save(cases, self.path)
        self.process = subprocess.Popen(
            [python, "-c", PEER, self.path, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = json.loads(self.process.stdout.readline())

    def run(self, name: str) -> tuple[float, Tensor]:
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        seconds = json.loads(self.process.stdout.readline())
        return seconds, torch.load(f"{self.path}.result")


def detections(count: int, centers: int, spread: float) -> tuple[Tensor, Tensor]:
    """Boxes around random centers, as detectors give them before NMS, and their scores."""
    around = torch.rand(centers, 2) * 1000
    start = around[torch.randint(centers, (count,))] + torch.randn(count, 2) * spread
    return torch.cat((start, start + 30 + 60 * torch.rand(count, 2)), 1), torch.rand(count)


def compare(name: str, ours: Callable[[], Tensor], peer: Peer, same: Callable[[Tensor, Tensor], bool]) -> None:
    times: list[tuple[float, float]] = []
    for _ in range(7):
        start = time.perf_counter()
        result = ours()
        seconds = time.perf_counter() - start
        theirs, expected = peer.run(name)
        assert same(result, expected), f"{name}: the results differ"
        times.append((seconds, theirs))
    mine, theirs = ([1000 * pair[side] for pair in times[1:]] for side in (0, 1))
    print(
        f"{name:28} pentad {min(mine):8.2f} ms (median {median(mine):8.2f})"
        f"   torchvision {min(theirs):8.2f} ms (median {median(theirs):8.2f})"
        f"   {min(mine) / min(theirs):5.2f} x its time"
    )


def nms_section(python: str, threads: int) -> None:
    from pentad.nn.boxes import nms, roi_align, roi_pool

    torch.manual_seed(0)
    grid = torch.randint(0, 40, (10_000, 2)).float()
    ties = torch.cat((grid, grid + torch.randint(1, 20, (10_000, 2))), 1), torch.randint(10, (10_000,)) / 10
    boxes = {
        "NMS 10,000, crowded": detections(10_000, 300, 5.0),
        "NMS 10,000, spread": detections(10_000, 10_000, 5.0),
        "NMS 10,000, ties": ties,
        "NMS 300": detections(300, 30, 5.0),
        "NMS 0": detections(0, 1, 1.0),
    }
    features = torch.randn(1, 256, 64, 64).to(memory_format=torch.channels_last)
    start = torch.rand(500, 2) * 240 - 10
    regions = torch.cat((torch.zeros(500, 1), start, start + 5 + 100 * torch.rand(500, 2)), 1)
    cases: dict[str, tuple] = {name: ("nms", *pair, 0.5) for name, pair in boxes.items()}
    for sampling in (2, -1):
        for aligned in (False, True):
            name = f"RoIAlign 500, {sampling}, {aligned}"
            cases[name] = ("roi_align", features, regions, [7, 7], 0.25, sampling, aligned)
    cases["RoIPool 500"] = ("roi_pool", features, regions, [7, 7], 0.25)
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(python, cases, threads, folder)
        print(f"torch {torch.__version__}, {peer.version}, {threads} thread(s)")
        for name, (corners, scores) in boxes.items():
            compare(name, lambda c=corners, s=scores: nms(c, s, 0.5), peer, torch.equal)
        for name in [name for name in cases if name.startswith("RoIAlign")]:
            *_, sampling, aligned = cases[name]
            compare(
                name,
                lambda s=sampling, a=aligned: roi_align(
                    features, regions[:, 1:], torch.zeros(500).long(), (7, 7), 0.25, max(s, 0), a
                ),
                peer,
                lambda one, other: torch.allclose(one, other, atol=1e-5),
            )
        pool = partial(roi_pool, features, regions[:, 1:], torch.zeros(500).long(), (7, 7), 0.25)
        compare("RoIPool 500", pool, peer, torch.equal)
        peer.process.stdin.close()


def scenes_section(*_: object) -> None:
    from pentad.datasets.scenes import Scenes

    scenes = Scenes(100, seed=1, size=160, objects=(3, 3))
    scenes[0]  # reads the digits and photographs
    best = []
    for index in range(100):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            scenes[index]
            times.append(1000 * (time.perf_counter() - start))
        best.append(min(times))
    print(f"a scene of 160 x 160 with 3 objects: median {median(best):.2f} ms, slowest {max(best):.2f} ms")


def darknet_runners(network: torch.nn.Module, path: Path, x: Tensor, folder: Path, threads: int) -> dict:
    """The peers that are installed, each as a function that returns the inputs of the detection layers."""
    import cv2

    cv2.setNumThreads(threads)
    peer = cv2.dnn.readNetFromDarknet(str(path), str(path.with_suffix(".weights")))
    names = peer.getUnconnectedOutLayersNames()

    def opencv() -> list[Tensor]:
        peer.setInput(x.numpy())
        return [torch.from_numpy(out)[:, 4] for out in peer.forward(names)]  # objectness, after the detection layers

    runners = {"OpenCV": opencv, "torch": partial(network.outputs, x.contiguous(memory_format=torch.channels_last))}

    class Outputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.network.outputs(images))

    with contextlib.suppress(ModuleNotFoundError):
        import onnx  # noqa: F401 - the exporter needs it
        import onnxruntime

        torch.onnx.export(Outputs().eval(), (x,), str(folder / "x.onnx"), dynamo=False, opset_version=17)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(folder / "x.onnx", options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x.numpy()}
        runners["onnxruntime"] = lambda: [torch.from_numpy(out) for out in session.run(None, feed)]
    with contextlib.suppress(ModuleNotFoundError):
        import ncnn
        import pnnx

        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
            pnnx.export(Outputs().eval(), "x.pt", (x,), fp16=False)
        net = ncnn.Net()
        net.opt.num_threads = threads
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = (
            False  # float32, as the others
        )
        net.load_param(str(folder / "x.ncnn.param"))
        net.load_model(str(folder / "x.ncnn.bin"))
        image, outputs = ncnn.Mat(x[0].numpy()), net.output_names()

        def run_ncnn() -> list[Tensor]:
            with net.create_extractor() as extractor:
                extractor.input(net.input_names()[0], image)
                return [torch.from_numpy(np.array(extractor.extract(name)[1]))[None] for name in outputs]

        if outputs:  # pnnx can't convert every network
            runners["ncnn"] = run_ncnn
    return runners


@torch.inference_mode()
def darknet_section(_: str, threads: int) -> None:
    from pentad import weights
    from pentad.build import build
    from pentad.vision.darknet_plan import DarknetPlan
    from pentad.weights.registry import locate

    for name in options.cfg:
        path = locate(name)
        network = build(weights.open(path))
        x = torch.rand(1, *network.cfg.shape)
        plan = DarknetPlan(network, 1, threads)
        expected = [out.clone() for out in network.outputs(x)]
        with tempfile.TemporaryDirectory() as folder:
            runners = {"pentad": lambda plan=plan, x=x: plan.run(x)}
            runners |= darknet_runners(network, path, x, Path(folder), threads)
            network.eval()  # the exporter leaves it in training mode
            for peer, run in runners.items():
                objectness = [
                    network.layers[n](x).objectness_BN[0] for n, x in zip(network.heads, expected, strict=True)
                ]
                for out, wanted in zip(run(), objectness if peer == "OpenCV" else expected, strict=True):
                    assert torch.allclose(out, wanted, atol=1e-2, rtol=1e-2), f"{peer}: the outputs differ"
            times = {peer: [] for peer in runners}
            for _ in range(30):
                for peer, run in runners.items():
                    start = time.perf_counter()
                    run()
                    times[peer].append(1000 * (time.perf_counter() - start))
        for peer, values in times.items():
            ratios = f"pentad: {median(values) / median(times['pentad']):.2f} x as fast"
            if peer != "pentad":
                report(name, peer, median(values) / median(times["pentad"]))
            print(f"{name:20} {peer:12} min {min(values):7.2f} ms   median {median(values):7.2f} ms   {ratios}")


def interleaved(rounds: int = 6, **calls: Callable[[], object]) -> dict[str, float]:
    """The least processor seconds of each call; they take turns, and the first turn doesn't count."""
    best: dict[str, float] = {}
    for turn in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds = time.process_time() - start
            if turn:
                best[name] = min(seconds, best.get(name, seconds))
    return best


def vit_section(*_: object) -> None:
    """ViT-B/16 with the same random weights in both; its own file, as transformers writes it."""
    from transformers import ViTConfig, ViTForImageClassification

    import pentad.weights
    from pentad.build import build

    theirs = ViTForImageClassification(ViTConfig(num_labels=1000)).eval()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        theirs.save_pretrained(folder)
        ours = build(pentad.weights.open(folder))
        half = ViTForImageClassification.from_pretrained(folder, dtype=torch.bfloat16).eval()
        for count in (1, 4):
            x = torch.randn(count, 3, 224, 224)
            assert torch.allclose(ours(x), theirs(x).logits, atol=1e-4)
            best = interleaved(pentad=lambda x=x: ours(x), transformers=lambda x=x: theirs(x))
            ratio = best["transformers"] / best["pentad"]
            print(f"ViT-B/16, {count} images, float32: {best}, {ratio:.2f} x as fast")
            report(f"ViT-B/16, {count} images, float32", "transformers", ratio)
        x = torch.randn(1, 3, 224, 224)
        best = interleaved(2, pentad=lambda: ours(x), transformers=lambda: half(x.bfloat16()))
        print(f"a bfloat16 file, 1 image: {best}, {best['transformers'] / best['pentad']:.2f} x as fast")


def mae_section(*_: object) -> None:
    """A training step of MAE-L/16, which sees a quarter of the patches, and one whose encoder sees all."""
    from pentad.build import build
    from pentad.models.vision.mae import MAEConfig, Masking, mae_loss

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    network = build(MAEConfig(**large, norm_pix_loss=True), trainable=True)
    x, noise = torch.randn(1, 3, 224, 224), torch.rand(1, 196)
    masking = Masking.random(noise, 49)

    def masked() -> None:
        mae_loss(network(x, masking), x, masking, 16, norm_pix=True).backward()

    everything = Masking(noise.argsort(1), masking.masked_BM)

    def full() -> None:  # SimMIM's way: masked patches go through the encoder, too
        mae_loss(network(x, everything), x, masking, 16, norm_pix=True).backward()

    best = interleaved(3, masked=masked, full=full)
    print(f"MAE-L/16, a step of 1 image: {best}, {best['full'] / best['masked']:.2f} x as fast")


def mask_rcnn_section(python: str, _: int) -> None:
    """Mask R-CNN on ResNet-50 with random weights and batch norms, on a photo of 480 x 640 in its 800 x 1066 pixels."""
    from pentad.build import build
    from pentad.train.objectives.mask_rcnn import Truth, mask_rcnn_losses
    from pentad.vision.mask_rcnn import DIVISOR, MaskRCNNPredictor, fit_objects
    from pentad.vision.preprocess import pad_batch, resize_masks
    from pentad.weights import open as open_weights

    photo = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 60, 80), np.uint8))
    photo = photo.repeat_interleave(8, 1).repeat_interleave(8, 2)
    boxes = torch.tensor([[40.0, 50, 300, 400], [320, 100, 600, 460], [10, 10, 90, 120]])
    masks = torch.zeros(3, 480, 640, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    with tempfile.TemporaryDirectory() as folder:
        target = {"boxes": boxes, "labels": torch.tensor([1, 17, 3]), "masks": masks}
        torch.save({"image": photo / 255, "target": target}, f"{folder}/case.pt")
        peer = subprocess.Popen(
            [python, "-c", MASK_RCNN_PEER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        print(json.loads(peer.stdout.readline()))
        network = build(open_weights(f"{folder}/rcnn.pth"), trainable=True).to(memory_format=torch.channels_last)
        predict = MaskRCNNPredictor(network)
        fitted, moved = fit_objects(photo, boxes, network.config.min_size, network.config.max_size)
        truth = Truth(moved, target["labels"], resize_masks(masks.bool(), *fitted.shape[1:]))
        x, sizes = pad_batch([fitted], DIVISOR)

        def forward() -> object:
            with torch.inference_mode():
                return predict([photo], 0.05)[0]

        def step() -> object:
            losses = mask_rcnn_losses(network, x, sizes, [truth])
            torch.stack(list(losses.values())).sum().backward()
            network.zero_grad()
            return losses

        for name, ours in (("forward", forward), ("step", step)):
            network.train(name == "step")
            best = {"pentad": float("inf"), "torchvision": float("inf")}
            for _ in range(3):
                start = time.process_time()
                found = ours()
                best["pentad"] = min(best["pentad"], time.process_time() - start)
                peer.stdin.write(name + "\n")
                peer.stdin.flush()
                best["torchvision"] = min(best["torchvision"], json.loads(peer.stdout.readline()))
            theirs = torch.load(f"{folder}/result.pt")
            if name == "forward":
                assert torch.allclose(found.boxes_N4, theirs["boxes"], atol=0.05)
                assert torch.equal(found.labels_N, theirs["labels"])
                print(f"{len(found.boxes_N4)} objects")
            else:
                for loss, value in theirs.items():  # boxes are sampled at random
                    assert abs(float(found[loss]) - float(value)) < 0.1 * abs(float(value)) + 0.02, loss
            print(f"Mask R-CNN, {name}: {best}, {best['torchvision'] / best['pentad']:.2f} x as fast")
        peer.stdin.close()


SECTIONS = {
    "nms": nms_section,
    "vit": vit_section,
    "mae": mae_section,
    "mask-rcnn": mask_rcnn_section,
    "scenes": scenes_section,
    "darknet": darknet_section,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--peer", default=sys.executable, help="a Python interpreter with torchvision")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cfg", nargs="+", default=["yolov3-tiny"], help="names or .cfg files of Darknet networks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for section in options.sections:
        SECTIONS[section](options.peer, options.threads)
