from __future__ import annotations

import json
from dataclasses import Field, asdict, fields
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm import Request
from ldm.diffusion import samplers
from ldm.diffusion.grids import GRIDS
from ldm.errors import RequestError
from ldm.request import MULTIPLES, SIZE_MULTIPLE


def values_of(f: Field) -> st.SearchStrategy:
    """All the values a field of Request may have, by its type and metadata."""
    kind, *optional = str(f.type).split(" | ")
    least, most, choices = (f.metadata.get(key) for key in ("least", "most", "choices"))
    choices = {"sampler": samplers.NAMES, "schedule": list(GRIDS)}.get(f.name, choices)
    if choices is not None:
        values = st.sampled_from(choices)
    elif kind == "int" and f.name in MULTIPLES:
        values = st.integers(-(-least // SIZE_MULTIPLE), most // SIZE_MULTIPLE).map(lambda n: n * SIZE_MULTIPLE)
    else:
        numbers = {"int": partial(st.integers, least, most), "float": partial(st.floats, least, most)}
        values = {"str": st.text, "bool": st.booleans, **numbers}[kind]()
    return st.none() | values if optional else values


def valid(values: dict) -> Request:
    """A request of values that are each allowed, made so together too."""
    if samplers.SAMPLERS[values["sampler"]].eta is None:
        values["eta"] = None
    values["guidance_start"], values["guidance_end"] = sorted((values["guidance_start"], values["guidance_end"]))
    return Request(**values)


REQUESTS = st.fixed_dictionaries({f.name: values_of(f) for f in fields(Request)}).map(valid)


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
        ({"sampler": "magic"}, "use one of ddim, plms, ddpm"),
        ({"sampler": 3}, "sampler is 3: use text"),
        ({"schedule": "magic"}, "schedule is 'magic': use one of uniform, quad"),
        ({"schedule": ["karras"]}, "schedule is ['karras']: use"),
        ({"noise": "mps"}, "noise is 'mps': use one of cpu, cuda"),
        ({"tiling": None}, "tiling is None: use one of none, both, x, y"),
        ({"only_masked": 1}, "only_masked is 1: use true or false"),
        ({"guidance_start": 0.9, "guidance_end": 0.2}, "guidance_start is 0.9, after guidance_end, 0.2"),
        ({"seed_width": 100}, "seed_width is 100: use 96 or 104"),
        ({"outpaint_left": 4}, "outpaint_left is 4: use 0 or 8"),
        ({"hires_scale": 0.5}, "hires_scale is 0.5: use a number from 1 to 8"),
        ({"clip_skip": 0}, "clip_skip is 0: use a whole number from 1 to 12"),
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


@pytest.mark.parametrize(
    ("name", "given", "sampler", "schedule"),
    [
        ("DPM++ 2M Karras", None, "dpmpp_2m", "karras"),
        ("DPM++ 2M Karras", "normal", "dpmpp_2m", "normal"),
        ("Euler a", None, "euler_a", None),
        ("euler_ancestral", None, "euler_a", None),
        ("DPMSolverMultistepScheduler", "beta", "dpmpp_2m", "beta"),
        ("DDIM", None, "ddim", None),
    ],
)
def test_samplers_have_our_names_whatever_they_were_called(name, given, sampler, schedule):
    request = Request("a", sampler=name, schedule=given)
    assert (request.sampler, request.schedule) == (sampler, schedule)


def test_seeds_count_up_and_wrap():
    assert Request(prompt="", seed=5, batch_size=3).seeds() == [5, 6, 7]
    assert Request(prompt="", seed=2**64 - 1, batch_size=2).seeds() == [2**64 - 1, 0]
    assert Request(prompt="").seeds() != Request(prompt="").seeds()


def test_each_image_has_a_request_of_its_own():
    assert Request(prompt="a", seed=5, batch_size=2).images() == [
        Request(prompt="a", seed=5),
        Request(prompt="a", seed=6),
    ]


def test_batches_and_variations():
    request = Request("a", seed=5, batch_size=2)
    assert request.seeds() == [5, 6]
    assert request.batch(3).seeds() == [11, 12]
    varied = Request("a", seed=5, batch_size=2, variation_strength=0.1)
    assert (varied.seeds(), varied.variation_seeds()) == ([5, 5], [6, 7])
    assert varied.batch(1).seeds() == [5, 5] and varied.batch(1).variation_seeds() == [8, 9]
    assert [(image.seed, image.variation_seed) for image in varied.images()] == [(5, 6), (5, 7)]
    assert [image.variation_seed for image in request.images()] == [None, None]
    alone = Request("a", variation_strength=0.1).images()[0]
    assert alone.variation_seed == (alone.seed + 1) % 2**64
