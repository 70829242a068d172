"""COCO's annotations of objects."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pentad import BadInput
from pentad.datasets.coco import coco_json, read_coco
from tests.helpers.labeled_images import coco_content, write_coco


def test_annotations_become_boxes_labels_and_masks(tmp_path: Path) -> None:
    dataset = read_coco(write_coco(tmp_path))
    assert dataset.names == ("cat", "dog", "unseen")  # in the order of ids
    assert dataset.counts() == {"cat": 2, "dog": 1, "unseen": 0}
    first, second = dataset
    assert first.image.shape == (3, 30, 40)
    assert first.boxes.tolist() == [[2, 3, 12, 8], [20, 10, 30, 20]]
    assert first.labels.tolist() == [1, 0]
    assert first.masks.sum((1, 2)).tolist() == [50, 100]
    assert first.masks[1, 10:20, 20:30].all()
    assert second.crowd.tolist() == [True]
    assert second.masks[0, :, :10].all()
    assert not second.masks[0, :, 10:].any()


@pytest.mark.parametrize("place", ["images", "../val2017", "../images/val2017"])
def test_images_are_found_where_coco_has_them(place: str, tmp_path: Path) -> None:
    file = write_coco(tmp_path / "annotations")
    (tmp_path / "annotations" / place).mkdir(parents=True)
    for image in file.parent.glob("*.png"):
        image.rename(file.parent / place / image.name)
    file = file.rename(file.with_name("instances_val2017.json"))
    assert read_coco(file)[0].image.shape == (3, 30, 40)
    assert len(read_coco(file.parent.parent)) == 2


def changed(key: str, index: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[key][index].update(values)


def appended(key: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[key].append({**content[key][0], **values})


BAD = {
    "NaN in the box": (changed("annotations", 0, bbox=[float("nan"), 1, 2, 3]), "annotation 1.*not finite"),
    "infinite": (changed("annotations", 0, bbox=[1, 1, float("inf"), 3]), "annotation 1.*not finite"),
    "negative width": (changed("annotations", 0, bbox=[5, 5, -2, 3]), r"annotation 1.*\[5, 5, 3, 8\] has no area"),
    "no height": (changed("annotations", 0, bbox=[5, 5, 2, 0]), "annotation 1.*no area"),
    "outside": (changed("annotations", 0, bbox=[35, 5, 20, 3]), "annotation 1.*beyond the image, which is 40 x 30"),
    "negative": (changed("annotations", 0, bbox=[-9, 5, 20, 3]), "annotation 1.*beyond"),
    "three numbers": (changed("annotations", 0, bbox=[1, 2, 3]), r"annotation 1.*bbox is \[1, 2, 3\]"),
    "text": (changed("annotations", 0, bbox=["1", 2, 3, 4]), "annotation 1.*bbox"),
    "huge": (changed("annotations", 0, bbox=[10**400, 2, 3, 4]), "annotation 1.*bbox"),
    "no such image": (changed("annotations", 1, image_id=5), "annotation 2.*image_id is 5"),
    "no such category": (changed("annotations", 1, category_id=2), "annotation 2.*category_id is 2"),
    "id twice": (changed("annotations", 1, id=1), "annotation 1.*id was used"),
    "box twice": (appended("annotations", id=4), "annotation 4.*already"),
    "negative area": (changed("annotations", 0, area=-1), "annotation 1.*area"),
    "size of the RLE": (changed("annotations", 2, segmentation={"size": [9, 9], "counts": [81]}), "annotation 3.*size"),
    "RLE": (changed("annotations", 2, segmentation={"size": [10, 20], "counts": [1]}), "annotation 3.*1 pixels"),
    "polygon": (changed("annotations", 1, segmentation=[[1, 2, 3, 4]]), "annotation 2.*polygons"),
    "polygon with NaN": (changed("annotations", 1, segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "annotation 2"),
    "missing file": (changed("images", 1, file_name="c.png"), "image 9.*c.png is not there"),
    "name of no file": (changed("images", 1, file_name="x" * 5000), "image 9.*is not there"),
    "path out": (changed("images", 1, file_name="../b.png"), "image 9.*inside"),
    "no size": (changed("images", 0, width=0), "image 7.*width"),
    "image's id twice": (changed("images", 1, id=7), "image 7.*id was used"),
    "file twice": (appended("images", id=11), "image 11.*named before"),
    "name twice": (changed("categories", 0, name="cat"), "category 1.*cat"),
    "no name": (changed("categories", 0, name=None), "category 3.*name"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_records_are_named(case: str, tmp_path: Path) -> None:
    change, said = BAD[case]
    content = coco_content()
    change(content)
    file = write_coco(tmp_path, content)
    with pytest.raises(BadInput, match=f"(?s)annotations.json.*{said}") as error:
        read_coco(file)
    assert "\n" not in str(error.value)
    if "category " not in said:
        dataset = read_coco(file, skip_bad=True)
        assert dataset.skipped[0] == str(error.value)
        assert len(dataset) >= 1


def test_rounding_at_the_border_is_cut(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][0]["bbox"] = [-0.4, 3, 40.9, 5]
    assert read_coco(write_coco(tmp_path, content)).images[0].objects[0].box == (0, 3, 40, 8)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "not JSON"), ("[1, 2]", "images"), ("{", "not JSON"), ('{"images": {}}', "images"), ("[" * 9999, "JSON")],
)
def test_other_files_are_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BadInput, match=f"x.json.*{said}"):
        read_coco(tmp_path / "x.json")
    with pytest.raises(BadInput, match="not there"):
        read_coco(tmp_path / "missing.json")


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][1] |= {"width": 24, "height": 12}
    content["annotations"].pop()
    with pytest.raises(BadInput, match=r"b\.png is 20 x 10.*24 x 12"):
        read_coco(write_coco(tmp_path, content))[1]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-50, 50) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "size", "counts"]), inner),
    max_leaves=6,
)


@settings(max_examples=60)
@given(st.sampled_from(["images", "annotations", "categories"]), st.integers(0, 2), st.data())
def test_any_change_gives_a_data_set_or_bad_input(
    tmp_path_factory: pytest.TempPathFactory, key: str, index: int, data: st.DataObject
) -> None:
    content = coco_content()
    records = content[key]
    if data.draw(st.booleans()):
        record = records[index % len(records)]
        record[data.draw(st.sampled_from(sorted(record)))] = data.draw(values)
    else:
        records[index % len(records)] = data.draw(values)
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        write_coco(folder)
    file = folder / "annotations.json"
    file.write_text(json.dumps(content))
    for skip_bad in (False, True):
        with contextlib.suppress(BadInput):
            for image in read_coco(file, skip_bad=skip_bad).images:
                size = image.height, image.width
                assert all(o.mask(*size).shape == size for o in image.objects)


def test_what_is_written_is_read_by_pycocotools(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    dataset = read_coco(write_coco(tmp_path))
    file = tmp_path / "again.json"
    file.write_text(json.dumps(coco_json(dataset.names, dataset.images, tmp_path)))
    with contextlib.redirect_stdout(io.StringIO()):
        peer = COCO(str(file))
    assert [c["name"] for c in peer.loadCats(peer.getCatIds())] == ["cat", "dog", "unseen"]
    for image in dataset.images:
        annotations = peer.loadAnns(peer.getAnnIds(imgIds=[image.number]))
        theirs = [peer.annToRLE(a)["counts"].decode() for a in annotations if "segmentation" in a]
        assert [o.rle(image.height, image.width)["counts"] for o in image.objects if o.segmentation] == theirs
    assert [image.objects for image in read_coco(file).images] == [image.objects for image in dataset.images]
