"""Segment Anything against Meta's code, interleaved, with the same answers: python benchmarks/segment.py [encoder …].

encoder: the image encoder's processor time. memory: its peak beyond the weights, each in a process of its own.
bf16: the encoder in bfloat16, if this CPU multiplies it faster, and how much its masks differ from those of float32.
decoder: one prompt, and 64 at once. everything: masks of a grid of points in a photo whose map is given.

Both have the same random weights, as the published ones can't be had everywhere. So that masks remain, predicted IoU
and logits are shifted and scaled (`calibrate`).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardware import machine, memory
from vision import interleaved

PIXELS, GRID = 1024, 64
KEPT_IOU = 0.9  # half of the masks have a higher predicted IoU


class Sides(NamedTuple):
    """The same weights in both programs.

    Attributes:
        ours: a Segmenter.
        theirs: segment_anything's Sam.
        path: their file.
    """

    ours: Any
    theirs: Any
    path: Path


def meta(size: str) -> Any:
    """segment_anything's Sam, untrained; torchvision's binaries need not fit torch."""
    import tests.helpers.torchvision_stub  # noqa: F401

    torch.manual_seed(0)
    import segment_anything

    if size != "small":
        return segment_anything.sam_model_registry[f"vit_{size}"]().eval()
    shape = {"embed_dim": 32, "depth": 2, "num_heads": 2, "global_attn_indexes": [1]}
    build = sys.modules["segment_anything.build_sam"]._build_sam  # the package's `build_sam` is a function
    return build(**{f"encoder_{name}": value for name, value in shape.items()}).eval()


def both(size: str, folder: Path) -> Sides:
    import pentad

    theirs, path = meta(size), folder / "sam.pth"
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.normal_(0.0, 0.1)  # zeros would cost nothing to check
    torch.save(theirs.state_dict(), path)
    return Sides(pentad.load(path), theirs, path)


def report(name: str, best: dict[str, float]) -> None:
    ratio = best["meta"] / best["pentad"]
    print(f"{name}: pentad {best['pentad']:.3f} s, Meta's {best['meta']:.3f} s, {ratio:.2f} x as fast", flush=True)


def picture() -> Tensor:
    return torch.randn(1, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))


def encoder_section(sides: Sides, options: argparse.Namespace) -> None:
    x, results = picture(), dict[str, Tensor]()
    ours, theirs = sides.ours.sam.image_encoder, sides.theirs.image_encoder
    best = interleaved(
        options.rounds, pentad=lambda: results.update(pentad=ours(x)), meta=lambda: results.update(meta=theirs(x))
    )
    difference = float((results["pentad"] - results["meta"]).abs().max())
    assert difference < 1e-4, f"the maps differ by {difference}"
    report(f"encoder, ViT-{options.size}, float32 (maps differ by {difference:.0e})", best)


def memory_section(sides: Sides, options: argparse.Namespace) -> None:
    peaks = {}
    for program in ("pentad", "meta"):
        command = [sys.executable, __file__, "--peak", program, str(sides.path), "--size", options.size]
        done = subprocess.run([*command, "--threads", str(options.threads)], check=True, capture_output=True, text=True)
        peaks[program] = json.loads(done.stdout)
    shown = ", ".join(f"{program} {peak / 1e6:,.0f} MB" for program, peak in peaks.items())
    print(f"encoder, peak beyond the weights: {shown}, {peaks['pentad'] / peaks['meta']:.2f} of its memory", flush=True)


def peak(program: str, path: str, size: str) -> int:
    """The bytes by which this process's memory peaks above the loaded weights while an image is embedded."""
    if program == "pentad":
        import pentad

        encoder = pentad.load(path).sam.image_encoder
        for parameter in encoder.parameters():
            parameter.sum()  # reads mapped weights
    else:
        sam = meta(size)
        sam.load_state_dict(torch.load(path, weights_only=True))
        encoder = sam.image_encoder
    x = picture()
    encoder.patch_embed(x)  # torch's libraries allocate at their first call
    before = memory()["now"]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    encoder(x)
    return memory()["peak"] - before


def bf16_section(sides: Sides, options: argparse.Namespace) -> None:
    import pentad

    x, w = torch.randn(128, 1024), torch.randn(1024, 1024)
    half = x.bfloat16(), w.bfloat16()
    best = interleaved(4, float32=lambda: x @ w, bfloat16=lambda: half[0] @ half[1])
    speed = best["float32"] / best["bfloat16"]
    print(f"bfloat16 is multiplied {speed:.2f} x as fast as float32", flush=True)
    if speed < 1 and options.size != "small":
        return
    rounded, results = pentad.load(sides.path, dtype="bfloat16"), dict[str, Tensor]()
    x = picture()
    best = interleaved(
        options.rounds,
        float32=lambda: results.update(float32=sides.ours.sam.image_encoder(x)),
        bfloat16=lambda: results.update(bfloat16=rounded.sam.image_encoder(x.bfloat16()).float()),
    )
    request = grid_request(2 if options.size == "small" else 8)
    exact, other = (
        image(sides.ours, results[name][0]).decode(request, slice(None), True)[0] > 0
        for name in ("float32", "bfloat16")
    )
    overlap = (exact & other).sum((2, 3)) / (exact | other).sum((2, 3)).clamp(min=1)
    iou = float(overlap.mean())
    assert iou >= 0.99 or options.size == "small", f"IoU of the masks is {iou}"
    print(f"encoder in bfloat16: {best}, {best['float32'] / best['bfloat16']:.2f} x as fast, IoU of masks {iou:.4f}")


def grid_request(side: int) -> Any:
    from pentad.vision.automatic import Everything
    from pentad.vision.prompts import Request

    points = Everything(points_per_side=side).grid(0)[:, None] * PIXELS
    return Request(points, torch.ones(len(points), 1, dtype=torch.int64), None, None)


def image(segmenter: Any, map_DSS: Tensor, height: int = PIXELS, width: int = PIXELS) -> Any:
    from pentad.vision.segmenter import EmbeddedImage

    return EmbeddedImage(segmenter, height, width, map_DSS)


def calibrate(sides: Sides, map_DSS: Tensor) -> None:
    """Give half of the masks a good predicted IoU, and all of them logits as large as a trained network's."""
    request = grid_request(4)
    logits, iou = image(sides.ours, map_DSS).decode(request, slice(None), True)
    for decoder in (sides.ours.sam.mask_decoder, sides.theirs.mask_decoder):
        decoder.iou_prediction_head.layers[-1].bias += KEPT_IOU - iou.median()
        for network in decoder.output_hypernetworks_mlps:
            network.layers[-1].weight *= 8 / logits.std()
            network.layers[-1].bias *= 8 / logits.std()


def decoder_section(sides: Sides, options: argparse.Namespace) -> None:
    map_DSS = torch.randn(256, GRID, GRID, generator=torch.Generator().manual_seed(0))
    embedded, theirs = image(sides.ours, map_DSS), sides.theirs
    for side in (1, 2 if options.size == "small" else 8):
        request, results = grid_request(side), dict[str, tuple[Tensor, Tensor]]()

        def meta_decode(request: Any = request) -> tuple[Tensor, Tensor]:
            points = request.points_PK2.float(), request.labels_PK
            sparse, dense = theirs.prompt_encoder(points=points, boxes=None, masks=None)
            position = theirs.prompt_encoder.get_dense_pe()
            found: tuple[Tensor, Tensor] = theirs.mask_decoder(map_DSS[None], position, sparse, dense, True)
            return found

        best = interleaved(
            options.rounds if side > 1 else 3 * options.rounds,
            pentad=lambda r=request, out=results: out.update(pentad=embedded.decode(r, slice(None), True)),
            meta=lambda out=results, call=meta_decode: out.update(meta=call()),
        )
        for mine, expected in zip(results["pentad"], results["meta"], strict=True):
            assert torch.allclose(mine, expected, atol=1e-3, rtol=1e-4), "the masks differ"
        report(f"decoder, {side**2} prompts", best)


class Given(torch.nn.Module):
    """An image encoder that returns a map."""

    img_size = PIXELS

    def __init__(self, map_DSS: Tensor) -> None:
        super().__init__()
        self.map_DSS = map_DSS

    def forward(self, _: Tensor) -> Tensor:
        return self.map_DSS[None]


def everything_section(sides: Sides, options: argparse.Namespace) -> None:
    from segment_anything import SamAutomaticMaskGenerator

    from pentad.media.images import read_image
    from pentad.vision.masks import decode

    photo = read_image(options.photo)
    pixels = photo.permute(1, 2, 0).contiguous().numpy()
    embedded = sides.ours.image(photo)  # cached: both get the same map
    calibrate(sides, embedded.map_DSS)
    encoder = sides.theirs.image_encoder
    sides.theirs.image_encoder = Given(embedded.map_DSS)
    settings = {"points_per_side": options.points, "pred_iou_thresh": KEPT_IOU, "box_nms_thresh": options.nms}
    scores = [
        mask.stability_score for mask in sides.ours.everything(photo, **{**settings, "stability_score_thresh": 0.0})
    ]
    settings["stability_score_thresh"] = round(median(scores), 4)
    generator = SamAutomaticMaskGenerator(sides.theirs, **settings, output_mode="uncompressed_rle")
    results = dict[str, list]()
    best = interleaved(
        options.rounds,
        pentad=lambda: results.update(pentad=sides.ours.everything(photo, **settings)),
        meta=lambda: results.update(meta=generator.generate(pixels)),
    )
    sides.theirs.image_encoder = encoder
    mine = dict[tuple, list[Tensor]]()
    for mask in results["pentad"]:
        mine.setdefault(tuple(round(x, 2) for x in mask.prompt["points"][0]), []).append(mask.mask)
    matched = 0
    for mask in results["meta"]:
        expected = decode(mask["segmentation"])
        near = mine.get(tuple(round(x, 2) for x in mask["point_coords"][0]), [])
        matched += any(float((one & expected).sum() / (one | expected).sum().clamp(min=1)) >= 0.95 for one in near)
    share = matched / max(1, len(results["meta"]))
    assert results["meta"], "no masks"
    assert share >= 0.99, f"{share:.1%} of {len(results['meta'])} masks match"
    name = f"everything, {options.points**2} points, {photo.shape[2]} x {photo.shape[1]} pixels"
    report(f"{name}, {len(results['meta'])} masks, {share:.1%} matched ({len(results['pentad'])} found)", best)


SECTIONS = {
    "encoder": encoder_section,
    "memory": memory_section,
    "bf16": bf16_section,
    "decoder": decoder_section,
    "everything": everything_section,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--size", choices=["b", "l", "h", "small"], default="b")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="the first doesn't count")
    parser.add_argument("--photo", default=str(Path(__file__).parents[1] / "docs" / "dog.jpg"))
    parser.add_argument("--points", type=int, default=32, help="a side of the grid, for everything")
    parser.add_argument(
        "--nms",
        type=float,
        default=1.0,
        help="IoU of boxes of duplicates, for everything: random masks all span the photo, so by default all stay",
    )
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        with torch.inference_mode():
            print(peak(*options.peak, options.size))
        return
    print(
        f"{time.strftime('%Y-%m-%d')}; {machine('torch', 'segment-anything')}; {options.threads} thread(s)", flush=True
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        sides = both(options.size, Path(folder))
        for section in options.sections or SECTIONS:
            SECTIONS[section](sides, options)


if __name__ == "__main__":
    main()
