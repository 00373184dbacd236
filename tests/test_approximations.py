"""Faster and less exact, where asked for: DeepCache and token merging as their papers have them, or not at all."""

from __future__ import annotations

import math
import threading
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from synthetic import make_tensor
from test_names import diffusers_unet
from torch import Tensor

from ldm import Request, StableDiffusion, UNetConfig
from ldm.checkpoint.names import unet_names
from ldm.conditioning import Conditioned, Conditioning
from ldm.config import ScheduleConfig
from ldm.diffusion import NoiseSchedule, samplers
from ldm.errors import RequestError
from ldm.metadata import automatic1111, parameters, read_request, save_image
from ldm.models.layers import to_map, to_tokens
from ldm.models.unet import UNet, Upsample, for_each_prompt
from ldm.runtime.merging import Matching, merging
from ldm.runtime.tiling import seamless
from ldm.sampling import Branch, Conditions, Predictor, guided

SCHEDULE = NoiseSchedule(ScheduleConfig())
LEVELS = samplers.levels("ddim", SCHEDULE, 5)
SHARES = [1e-9, 0.3, 0.75]


def small_unet(**fields) -> UNet:
    config = UNetConfig(
        **{"channels": 32, "channel_mult": (1, 2), "blocks_per_level": 1, "attention_levels": (0, 1)} | fields,
        heads=2, context_dim=16,
    )  # fmt: skip
    unet = UNet(config)
    unet.load_state_dict({name: make_tensor(name, list(t.shape)) for name, t in unet.state_dict().items()})
    return unet.to(memory_format=torch.channels_last)


UNETS = pytest.mark.parametrize("fields", [{}, {"attention_levels": (1,)}, {"attention_levels": ()}], ids=str)


def contexts(count: int) -> list[Tensor]:
    return [make_tensor(f"context {i}", [1, 5, 16]) for i in range(count)]


# --- DeepCache --------------------------------------------------------------------------------------------------------


@UNETS
def test_a_whole_evaluation_is_all_layers_in_a_row(fields):
    """Bit for bit, with a prompt and with several, up to the last norm."""
    unet, seen = small_unet(**fields), []
    unet.norm_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, shifts = make_tensor("x", [2, 4, 7, 6]), unet.embed_time(torch.tensor([500.0]))
    for prompts in (1, 3):
        keys_values = unet.embed_context(torch.cat(contexts(2 * prompts)))
        shift, key_value = iter(shifts), iter(keys_values)
        h = unet.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for layer in unet.down:
            h = layer(h, shift, key_value) if hasattr(layer, "resnet") else layer(h)
            skips.append(h)
        for stage in unet.middle:
            h = stage(h, shift, key_value)
        for layer in unet.up:
            if isinstance(layer, Upsample):
                h = layer(h, size=skips[-1].shape[-2:])
            else:
                h = layer(torch.cat([h, for_each_prompt(skips.pop(), h)], dim=1), shift, key_value)
        unet.predict(x, shifts, keys_values)
        assert torch.equal(seen.pop(), h)


@UNETS
@pytest.mark.parametrize("ask", [Predictor.together, Predictor.apart])
def test_outermost_layers_on_fresh_features_are_the_whole(fields, ask):
    unet, x, other = small_unet(**fields), make_tensor("x", [2, 4, 8, 8]), make_tensor("other", [2, 4, 8, 8])
    branches = [Branch(context) for context in contexts(3)]
    plain, cached = (Predictor(unet, "epsilon", LEVELS, deep_cache=every) for every in (1, 3))

    def eps(predictor: Predictor, x: Tensor, step: int) -> Tensor:
        return torch.cat([each.eps for each in ask(predictor, x, LEVELS[2], branches, step)])

    for step in (3, 4, 5):  # of which the first is whole
        assert torch.equal(eps(cached, x, step), eps(plain, x, step))
    assert relative_error(eps(cached, other, 5), eps(plain, other, 5)) > 0.01
    assert torch.equal(eps(cached, other, 6), eps(plain, other, 6))
    assert torch.equal(eps(cached, x, 1), eps(plain, x, 1))  # back in steps, as some samplers go: nothing is kept


def diffusers_twin(unet: UNet):
    """diffusers' network with our weights."""
    theirs, ours = diffusers_unet(unet.config).eval(), unet.state_dict()
    names = {
        name: own
        for row in unet_names(unet.config)
        for name, own in zip(row.keys("diffusers"), row.keys("ours"), strict=True)
    }
    theirs.load_state_dict({name: ours[names[name]].reshape(t.shape) for name, t in theirs.state_dict().items()})
    return theirs


class ReferenceDeepCache:
    """Ma et al. 2023, section 3.2, on diffusers' layers: what enters the last one on the way up is kept."""

    def __init__(self, unet: UNet):
        self.unet, self.kept = diffusers_twin(unet), None
        self.block = self.unet.up_blocks[-1]
        self.block.resnets[-1].register_forward_pre_hook(self._keep)

    def _keep(self, module, args):
        self.kept = args[0][:, : -self.unet.conv_in.out_channels]  # before the skip connection

    def __call__(self, x: Tensor, t: Tensor, context: Tensor, whole: bool) -> Tensor:
        if whole:
            return self.unet(x, t, context).sample
        embedding = self.unet.time_embedding(self.unet.time_proj(t.expand(len(x))))
        kept = self.kept
        h = self.block.resnets[-1](torch.cat([kept, self.unet.conv_in(x)], dim=1), embedding)
        [h] = self.block.attentions[-1](h, encoder_hidden_states=context, return_dict=False)
        return self.unet.conv_out(F.silu(self.unet.conv_norm_out(h)))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_five_steps_of_deep_cache_equal_the_reference(every):
    unet = small_unet()
    uncond, cond = contexts(2)
    reference, scale, x = ReferenceDeepCache(unet), 3.0, make_tensor("x", [2, 4, 8, 12])
    expected = x
    for step, (level, following) in enumerate(pairwise(LEVELS)):
        both = torch.cat([uncond, uncond, cond, cond])
        answer = reference(torch.cat([expected] * 2), torch.tensor(level.t), both, step % every == 0)
        first, second = answer.chunk(2)
        eps = first + scale * (second - first)
        x0 = (expected - level.sigma * eps) / level.alpha
        expected = following.alpha * x0 + following.sigma * eps
    *_, last = run(unet, x, Conditions(always(cond), always(uncond)), Request("", cfg_scale=scale), every)
    assert relative_error(last.x, expected) <= 1e-5


def always(*contexts: Tensor) -> Conditioning:
    return Conditioning(tuple(Conditioned(1.0, (1000,), (context,)) for context in contexts))


def run(unet: UNet, x: Tensor, conditions: Conditions, request: Request, every: int, apart: bool = False):
    predictor = Predictor(unet, "epsilon", LEVELS, deep_cache=every)
    denoise = guided(predictor, conditions, request, LEVELS, apart)
    return samplers.run("ddim", denoise, x, LEVELS, lambda: torch.zeros_like(x), SCHEDULE, 0.0, None)


@pytest.mark.parametrize("edits", [False, True])
def test_branches_keep_features_of_their_own(edits):
    """One by one as together; those of an editing model differ in the picture that they see alone."""
    unet, x = small_unet(in_channels=8), make_tensor("x", [2, 4, 8, 8])
    uncond, first, second = contexts(3)
    positive = always(first) if edits else always(first, second)
    conditions = Conditions(positive, always(uncond), make_tensor("beside", [1, 4, 8, 8]), edits)
    together, apart, whole = (
        list(run(unet, x, conditions, Request("", cfg_scale=3), every, apart))[-1].x
        for every, apart in ((3, False), (3, True), (1, False))
    )
    assert relative_error(apart, together) <= 1e-5
    assert relative_error(together, whole) > 1e-3


COUNTED = [  # besides steps and deep_cache: which evaluations are whole
    ({"sampler": "ddim"}, 10, 3, [0, 3, 6, 9]),
    ({"sampler": "dpmpp_2m"}, 7, 1, [0, 1, 2, 3, 4, 5, 6]),
    ({"sampler": "dpmpp_2m"}, 7, 50, [0]),
    ({"sampler": "heun"}, 5, 2, [0, 3, 4, 7, 8]),  # it looks at levels 0 1, 1 2, 2 3, 3 4, 4
    ({"sampler": "ddim", "prompt": "a red circle AND a blue star"}, 4, 2, [0, 2]),
    ({"sampler": "ddim", "prompt": "a [red:blue:0.3] circle"}, 10, 5, [0, 4, 5]),  # blue from step 4
    ({"sampler": "ddim", "prompt": "a [red|blue] circle"}, 8, 4, [0, 2, 4, 5]),  # red red blue red, blue red …
    ({"sampler": "ddim", "guidance_start": 0.3}, 10, 5, [0, 3, 5]),
    ({"sampler": "ddim", "hires_scale": 2.0, "hires_strength": 0.75}, 4, 3, [0, 3, 4]),  # each pass has its own
]


@pytest.mark.parametrize(("fields", "steps", "every", "whole"), COUNTED, ids=str)
def test_every_so_many_steps_are_whole(shipped, monkeypatch, fields, steps, every, whole):
    begun, seen, enter, deep = [], [], UNet.enter, UNet.deep
    monkeypatch.setattr(UNet, "enter", lambda *args: (begun.append(1), enter(*args))[1])
    monkeypatch.setattr(UNet, "deep", lambda *args: (seen.append(len(begun) - 1), deep(*args))[1])
    list(shipped.stream(Request(**{"prompt": "a star"} | fields, steps=steps, deep_cache=every, cfg_scale=3, seed=1)))
    assert seen == whole


# --- token merging ----------------------------------------------------------------------------------------------------


def groups(x: Tensor, height: int, width: int, share: float) -> list[list[int]]:
    """Which tokens (h·w, c) become one, the destination first: Bolya and Hoffman 2023, in loops."""
    destinations = [row * width + column for row in range(0, height, 2) for column in range(0, width, 2)]
    found = []
    for token in range(height * width):
        if token not in destinations:
            cosines = [float(x[token] @ x[to] / x[token].norm() / x[to].norm()) for to in destinations]
            found.append((max(cosines), token, destinations[cosines.index(max(cosines))]))
    found.sort(reverse=True)
    count = min(int(share * height * width), len(found))
    together = {to: [to] for to in destinations}
    for _, token, to in found[:count]:
        together[to].append(token)
    return [*together.values(), *([token] for _, token, _ in found[count:])]


SIZES = pytest.mark.parametrize("size", [(4, 4), (5, 7), (6, 3), (1, 6), (5, 1), (1, 1)])


@SIZES
@pytest.mark.parametrize("share", SHARES)
def test_tokens_become_the_means_of_those_alike(size, share):
    """For each picture by itself; the similarity is that of `x`, what is merged is `y`."""
    height, width = size
    x, y = (make_tensor(name, [3, height * width, 6]).double() for name in "xy")
    matching = Matching(x, height, width, share)
    merged = matching.merge(y)
    back = matching.unmerge(merged)
    for picture in range(3):
        together = groups(x[picture], height, width, share)
        assert merged.shape[1] == len(together)
        for members in together:
            mean = y[picture, members].mean(dim=0)
            assert all(torch.allclose(back[picture, token], mean, rtol=1e-12, atol=1e-12) for token in members)


def self_attention(transformer, h: Tensor, size: tuple[int, int], share: float) -> Tensor:
    """Of a picture's tokens (n, c), one answer for each group, in loops over groups and heads."""
    attention, y = transformer.self_attention, transformer.norm1(h)
    together = groups(h, *size, share)
    means = torch.stack([y[members].mean(dim=0) for members in together])
    q, k, v = (means @ layer.weight.T for layer in (attention.to_q, attention.to_k, attention.to_v))
    answers, d = torch.zeros_like(means), h.shape[1] // attention.heads
    for i in range(len(means)):
        for head in range(attention.heads):
            part = slice(head * d, (head + 1) * d)
            scores = [math.exp(float(q[i, part] @ key[part]) / math.sqrt(d)) for key in k]
            answers[i, part] = sum(score * value[part] for score, value in zip(scores, v, strict=True)) / sum(scores)
    answers = answers @ attention.to_out.weight.T + attention.to_out.bias
    out = torch.zeros_like(h)
    for members, answer in zip(together, answers, strict=True):
        out[members] = answer
    return out


@SIZES
@pytest.mark.parametrize("share", SHARES)
def test_a_transformer_with_merged_tokens_equals_loops(size, share):
    unet, [context] = small_unet().double(), contexts(1)
    transformer = unet.up[-1].transformer
    x = make_tensor("map", [2, 32, *size]).double().contiguous(memory_format=torch.channels_last)
    [*_, key_value] = unet.embed_context(context.double())
    key_value = tuple(each.expand(2, -1, -1, -1) for each in key_value)

    def expected(share: float) -> Tensor:
        h = transformer.proj_in(to_tokens(transformer.norm(x)))
        h = h + torch.stack([self_attention(transformer, each, size, share) for each in h])
        h = h + transformer.cross_attention(transformer.norm2(h), key_value)
        h = h + transformer.feed_forward(transformer.norm3(h))
        return x + to_map(transformer.proj_out(h), like=x)

    with merging(unet, share, size):
        ours = transformer(x, key_value)
    assert relative_error(ours, expected(share)) <= 1e-12
    if int(share * size[0] * size[1]) and size != (1, 1):
        assert relative_error(ours, expected(0)) > 1e-3


@pytest.mark.parametrize(("attention_levels", "finest"), [((0, 1, 2), 0), ((1, 2), 1), ((2,), 2), ((), 2)], ids=str)
def test_the_finest_self_attention_alone_sees_fewer_tokens(attention_levels, finest):
    unet = small_unet(channel_mult=(1, 2, 2), attention_levels=attention_levels)
    size, tokens = (11, 6), (11 * 6, 6 * 3, 3 * 2)[finest]
    seen: list[tuple[str, int]] = []
    for name, layer in unet.named_modules():
        if name.endswith("to_q"):
            kind = "self" if "self_attention" in name else "cross"
            layer.register_forward_hook(lambda module, args, out, kind=kind: seen.append((kind, out.shape[1])))
    x, t, [context] = make_tensor("x", [1, 4, *size]), torch.tensor([500.0]), contexts(1)
    unet(x, t, context)
    whole = seen.copy()
    seen.clear()
    with merging(unet, 0.5, size):
        unet(x, t, context)
    assert max(whole)[1] == max(count for _, count in whole) == tokens
    fewer = {("self", tokens): ("self", tokens - tokens // 2)}
    assert seen == [fewer.get(each, each) for each in whole]


def test_pictures_of_a_batch_are_merged_each_by_itself():
    unet, x = small_unet().double(), make_tensor("x", [3, 4, 9, 6]).double()
    t, context = torch.tensor([500.0]), contexts(1)[0].double()
    with merging(unet, 0.5, x.shape[-2:]):
        batch = unet(x, t, context.expand(3, -1, -1))
        alone = torch.cat([unet(each, t, context) for each in x.split(1)])
    assert relative_error(batch, alone) <= 1e-12
    assert relative_error(unet(x, t, context.expand(3, -1, -1)), alone) > 1e-3


def test_merging_goes_with_seams_that_wrap():
    """What is shifted by whole 2×2 comes out shifted, of both at once."""
    unet, x = small_unet().double(), make_tensor("x", [1, 4, 8, 12]).double()
    t, context = torch.tensor([500.0]), contexts(1)[0].double()
    with seamless("both"), merging(unet, 0.5, x.shape[-2:]):
        ours, shifted = unet(x, t, context), unet(x.roll((2, 4), (-2, -1)), t, context)
    assert relative_error(shifted, ours.roll((2, 4), (-2, -1))) <= 1e-12


def test_nothing_is_merged_outside():
    """Without a share, afterwards, after an exception, and meanwhile in another thread: bit for bit."""
    unet, x, t, elsewhere = small_unet(), make_tensor("x", [1, 4, 8, 8]), torch.tensor([500.0]), []
    before = unet(x, t, contexts(1)[0])

    def evaluate():
        with torch.no_grad():
            elsewhere.append(unet(x, t, contexts(1)[0]))

    with pytest.raises(ZeroDivisionError), merging(unet, 0.5, (8, 8)):
        thread = threading.Thread(target=evaluate)
        thread.start()
        thread.join()
        assert not torch.equal(unet(x, t, contexts(1)[0]), before)
        raise ZeroDivisionError
    assert torch.equal(elsewhere[0], before)
    assert torch.equal(unet(x, t, contexts(1)[0]), before)
    assert isinstance(merging(unet, 0.0, (8, 8)), nullcontext)


# --- requests and pictures --------------------------------------------------------------------------------------------


def test_neither_is_on_unless_asked_for(shipped, monkeypatch):
    """Then every step is `predict`, and nothing is matched."""
    asked, predict = [], UNet.predict
    monkeypatch.setattr(UNet, "predict", lambda *args: (asked.append(1), predict(*args))[1])
    monkeypatch.setattr("ldm.runtime.merging.Matching", None)
    shipped.txt2img("a star", seed=3, steps=3)
    assert len(asked) == 3
    shipped.txt2img("a star", seed=3, steps=3, deep_cache=2)
    assert len(asked) == 3
    with pytest.raises(TypeError):
        shipped.txt2img("a star", seed=3, steps=3, token_merging=0.5)


@pytest.mark.parametrize(
    "fields", [{"deep_cache": 3}, {"token_merging": 0.5}, {"deep_cache": 2, "token_merging": 0.75}]
)
def test_pictures_are_near_and_the_same_in_any_batch(shipped: StableDiffusion, fields):
    prompt = "a red circle on a blue background"
    plain, alone, batch = (
        list(shipped.stream(Request(prompt, seed=seed, batch_size=size, steps=10, **given)))[-1].x
        for seed, size, given in ((7, 1, {}), (7, 1, fields), (5, 3, fields))
    )
    assert relative_error(batch[2:], alone) < 1e-5
    assert 1e-3 < relative_error(alone, plain) < 0.5


def test_settings_are_written_as_automatic1111_has_them(tmp_path, shipped, caplog):
    request = Request("a", token_merging=0.5, deep_cache=3, hires_scale=2.0, seed=1, cfg_scale=2.0, width=64, height=64)
    text = parameters(request, 25, "m")
    assert "Token merging ratio: 0.5," in text and "Token merging ratio hr: 0.5" in text
    assert automatic1111.parse(text).request.token_merging == 0.5
    assert not caplog.text
    save_image(tmp_path / "i.png", shipped.txt2img("a", seed=1, steps=1)[0], request, 25, "m")
    assert read_request(tmp_path / "i.png") == request
    assert "merging" not in parameters(Request("a", hires_scale=2.0), 25, "m")


@pytest.mark.parametrize(
    ("told", "share", "lost"),
    [
        ("Token merging ratio: 0.3", 0.3, None),
        ("Token merging ratio: 0.9", 0.75, None),  # which is all it merges
        ("Token merging ratio: 0.9, Token merging ratio hr: 0.9", 0.75, None),
        ("Token merging ratio: 0.5, Token merging ratio hr: 0.2", 0.5, "Token merging ratio hr: 0.2"),
        ("Token merging ratio hr: 0.2", 0.0, "Token merging ratio hr: 0.2"),
    ],
)
def test_settings_are_read_as_automatic1111_means_them(caplog, told, share, lost):
    origin = automatic1111.parse(f"a\nSteps: 5, Sampler: Euler, Schedule type: Normal, Seed: 1, {told}")
    assert origin.request.token_merging == share
    assert (lost in caplog.text) if lost else not caplog.text


def test_bounds():
    for fields in ({"deep_cache": 0}, {"deep_cache": 1.5}, {"token_merging": 0.8}, {"token_merging": -0.1}):
        with pytest.raises(RequestError, match=next(iter(fields))):
            Request("", **fields)
