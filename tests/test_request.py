from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm import Request
from ldm.diffusion import samplers
from ldm.errors import RequestError

SIZES = st.none() | st.integers(1, 1024).map(lambda n: 8 * n)
REQUESTS = st.builds(
    Request,
    prompt=st.text(),
    negative_prompt=st.text(),
    steps=st.integers(1, 1000),
    cfg_scale=st.floats(0, 1000),
    sampler=st.sampled_from(samplers.NAMES),
    seed=st.none() | st.integers(0, 2**64 - 1),
    width=SIZES,
    height=SIZES,
    batch_size=st.integers(1, 1024),
    strength=st.none() | st.floats(0, 1),
)


@given(REQUESTS)
def test_json_round_trip(request):
    assert Request.from_json(request.to_json()) == request


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"steps": 0}, "steps is 0: use a whole number from 1 to 1000"),
        ({"steps": 1001}, "from 1 to 1000"),
        ({"steps": 10.0}, "a whole number"),
        ({"steps": True}, "a whole number"),
        ({"strength": 1.5}, "strength is 1.5: use a number from 0 to 1"),
        ({"strength": -0.1}, "from 0 to 1"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan"),
        ({"cfg_scale": "7"}, "cfg_scale is '7'"),
        ({"eta": 2}, "from 0 to 1"),
        ({"eta": 0.5, "sampler": "plms"}, "plms has none"),
        ({"sampler": "euler"}, "use one of ddim, plms, ddpm"),
        ({"seed": -1}, "from 0 to"),
        ({"seed": 2**64}, "from 0 to"),
        ({"seed": 10**400}, "from 0 to"),
        ({"cfg_scale": 10**400}, "from 0 to 1000"),
        ({"width": 513}, "width is 513: use 512 or 520, a multiple of 8"),
        ({"height": 100}, "height is 100: use 96 or 104"),
        ({"width": 0}, "from 8 to 8192"),
        ({"height": 4}, "from 8 to 8192"),
        ({"width": 10**9}, "from 8 to 8192"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prompt": None}, "prompt is None: use text"),
        ({"negative_prompt": "\ud800"}, "use text in valid Unicode"),
    ],
)
def test_faults_are_named(fields, expected):
    with pytest.raises(RequestError, match=r"^[^\n]*$") as caught:
        Request(**{"prompt": "a", **fields})
    assert expected in str(caught.value)


def test_every_fault_is_named_at_once():
    with pytest.raises(RequestError) as caught:
        Request(prompt="a", steps=0, width=513, sampler="magic", strength=2)
    assert str(caught.value).count("; ") == 3


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
    )
)
def test_hostile_json_is_refused(value):
    with pytest.raises(RequestError):
        Request.from_json(json.dumps(value))


@given(
    st.sampled_from(sorted(asdict(Request(prompt="")))),
    st.none() | st.booleans() | st.floats() | st.text() | st.lists(st.none()),
)
def test_hostile_fields_are_refused_or_valid(name, value):
    text = json.dumps({"prompt": "a", name: value})
    try:
        request = Request.from_json(text)
    except RequestError:
        return
    assert Request.from_json(request.to_json()) == request


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"prompt": "a", "stepz": 3}', "{}"])
def test_broken_json_is_refused(text):
    with pytest.raises(RequestError, match="a request must be"):
        Request.from_json(text)


def test_seeds_count_up_and_wrap():
    assert Request(prompt="", seed=5, batch_size=3).seeds() == [5, 6, 7]
    assert Request(prompt="", seed=2**64 - 1, batch_size=2).seeds() == [2**64 - 1, 0]
    assert Request(prompt="").seeds() != Request(prompt="").seeds()


def test_each_image_has_a_request_of_its_own():
    assert Request(prompt="a", seed=5, batch_size=2).images() == [
        Request(prompt="a", seed=5),
        Request(prompt="a", seed=6),
    ]
