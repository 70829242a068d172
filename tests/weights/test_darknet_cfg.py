"""Darknet's .cfg files: what is read, and that whatever is wrong is one line that names line and option."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pentad.errors import BadInput
from pentad.weights.darknet_cfg import MAX_LAYERS, parse, read_sections
from tests.helpers.darknet_files import conv, net, pool, route, section, v1, v2, v3, v4, yolo

HEAD = conv(24, 1, 1, "linear", 0)


def test_layers_have_darknets_shapes() -> None:
    layers = parse(v3()).layers
    assert [layer.kind for layer in layers[:6]] == [*["convolutional"] * 4, "shortcut", "maxpool"]
    assert layers[4].inputs == (3, 1)
    assert [layer.shape for layer in layers if layer.kind == "yolo"] == [(24, 12, 16), (24, 24, 32)]
    assert parse(v2()).layers[7].shape == (64, 12, 16)
    assert parse(v4()).layers[2].shape == (8, 24, 24)
    assert parse(v1(local=True)).layers[-4].shape == (6, 3, 3)


def test_comments_spaces_and_repeated_options() -> None:
    text = "# a comment\n; another\n[net] \r\n width = 8 # pixels\nheight=\t6\nheight=9\n\n"
    text += "[conv]\nfilters=4\nsize=3\npad=1\n"
    network = parse(text)
    assert network.shape == (3, 6, 8)
    assert network.layers[0].shape == (4, 6, 8)
    assert network.layers[0].activation == "logistic"  # Darknet's default
    assert [one.line for one in read_sections(text)] == [3, 8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no sections"),
        ("width=3", "line 1 comes before the first section"),
        ("[net", r"line 1 is '\[net'; expected a section"),
        ("[net]\nwidth", "line 2 is 'width'; expected option=value"),
        ("[convolutional]\nfilters=1", r"begins with \[convolutional\]; expected a Darknet \.cfg"),
        (net(8, 8), r"a \[net\] section only"),
        (section("net", width=8), "height is missing"),
        (net(0, 8) + conv(1), "width is 0; expected a whole number from 1 to 16,384"),
        (net(10**6, 8) + conv(1), "width is 1000000; expected"),
        (net("١٢", 8) + conv(1), "width is ١٢; expected"),
        (net(8, 8) + section("gaussian"), r"line \d+, \[gaussian\]: unknown layer; known layers: convolutional"),
        (net(8, 8) + section("convolutional", size=3), "filters is missing; expected a whole number"),
        (net(8, 8) + conv("many"), "filters is many; expected a whole number"),
        (net(8, 8) + conv(10**9), "filters is 1000000000; expected"),
        (net(8, 8) + conv(4, activation="gelu"), "activation is gelu; expected one of linear, leaky"),
        (net(8, 8) + conv(4, groups=3), "groups is 3, which doesn't divide 3 channels and 4 filters"),
        (net(8, 8) + conv(4, xnor=1), "xnor is 1, which pentad doesn't support"),
        (net(8, 8) + conv(4, 9).replace("pad=1", "pad=0"), "leaves nothing of its input of 8x8"),
        (net(8, 8) + route(), "layers is ; expected whole numbers"),
        (net(8, 8) + section("route"), "layers is missing"),
        (net(8, 8) + conv(4) + route(-1, 1), "layers is 1; expected an earlier layer: there are layers 0 to 0"),
        (net(8, 8) + conv(4) + route(-2), "layers is -2; expected an earlier layer"),
        (net(8, 8) + route(0), "layers is 0; expected an earlier layer: there is none before it"),
        (net(8, 8) + conv(4) + conv(4, 3, 2) + route(0, 1), "its layers have the sizes 8x8, 4x4; expected equal"),
        (net(8, 8) + conv(4) + route(0, groups=3), "group 0 of 3 is no part of 4 channels"),
        (net(8, 8) + conv(4) + route(0, groups=2, group_id=2), "group 2 of 2"),
        (net(8, 8) + conv(4) + conv(4, 3, 2) + section("shortcut", **{"from": -2}), "adds layers of 4x4 and 8x8"),
        (net(8, 8) + conv(4) + section("shortcut", **{"from": "0,0"}), "from is 0,0; expected one layer"),
        (net(8, 8) + conv(3) + section("reorg", stride=2), "stride is 2; expected one that divides 3 x 8 x 8"),
        (net(9000, 9000) + conv(100), r"its output is 100 x 9000 x 9000 numbers; expected less than 2\^31"),
        (net(9000, 9000) + section("connected", output=9000), "its weight is 243,000,000 x 9,000; expected less"),
        (net(999, 999) + section("local", filters=99, size=3), "its weights are too many"),
        (net(8, 8) + section("upsample", stride=64) * 4, "its output is .* numbers; expected less than 2"),
        (net(8, 8) + pool(2, 0), "stride is 0; expected"),
        (net(8, 8) + HEAD + yolo("0,1"), r"its input has 24 channels; expected 2 anchors x \(3 classes \+ 5\) = 16"),
        (net(8, 8) + HEAD + yolo("0,1,6"), "mask is 0,1,6; expected numbers from 0 to 5"),
        (net(8, 8) + HEAD + section("yolo", classes=3, num=3), "anchors is missing; expected 6"),
        (net(8, 8) + HEAD + section("yolo", classes=3, num=3, anchors="1,2,3,4,5,0"), "all above 0"),
        (net(8, 8) + HEAD + yolo("0,1,2", scale_x_y="nan"), "scale_x_y is nan; expected numbers"),
        (net(8, 8) + HEAD + section("region", classes=3, num=3, tree="9k.tree"), "tree is 9k.tree, which pentad"),
        (
            net(8, 8) + HEAD + section("detection", classes=3, side=3, num=2),
            r"expected side² \(5 num \+ classes\) = 117",
        ),
        (net(8, 8) + pool(1, 1) * (MAX_LAYERS + 1), "has 4,097 layers; expected at most 4,096"),
    ],
)
def test_a_broken_file_is_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


LINES = [line for text in (v1(local=True), v2(), v3(), v4()) for line in text.splitlines()]
VALUES = st.one_of(st.integers(-3, 300).map(str), st.floats().map(str), st.text(max_size=8))
EDITS = st.one_of(
    st.sampled_from(LINES),
    st.text(max_size=20),
    st.builds("{}={}".format, st.sampled_from([line.partition("=")[0] for line in LINES if "=" in line]), VALUES),
)


@given(st.sampled_from([v1(), v1(local=True), v2(), v3(), v4()]), st.data())
def test_any_text_is_a_network_or_one_line(text: str, data: st.DataObject) -> None:
    lines = text.splitlines()
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(lines)))
        lines[place : place + data.draw(st.integers(0, 3))] = data.draw(st.lists(EDITS, max_size=3))
    edited = "\n".join(lines)
    if (problem := refusal(edited)) is not None:
        assert len(problem.splitlines()) == 1
        return
    network = parse(edited)
    assert all(min(layer.shape) > 0 for layer in network.layers)
    assert all(-1 <= source < number for number, layer in enumerate(network.layers) for source in layer.inputs)


def refusal(text: str) -> str | None:
    """The error about a text; None if it is a network."""
    try:
        parse(text)
    except BadInput as error:
        return str(error)
    return None
