"""ComfyUI's graph → Request: the PNG chunk `prompt`, {id: {"class_type": …, "inputs": {name: value or [id, slot]}}}."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ldm.diffusion import samplers
from ldm.errors import ImageError, printable
from ldm.metadata.origin import (
    Origin,
    draws_brownian,
    find_grid,
    find_sampler,
    load_object,
    stem,
    warn_lost,
)
from ldm.request import Request

SAMPLERS = {"KSampler", "KSamplerAdvanced"}
CONTENTS = ("value", "text", "string", "seed", "int", "float", "Number", "Text")  # inputs of nodes that hold one value
MASKING = {"VAEEncodeForInpaint", "SetLatentNoiseMask", "InpaintModelConditioning"}
PLAIN = {  # nodes that say nothing which is not read here; any other may have shaped the picture
    *SAMPLERS, *MASKING, "CLIPTextEncode", "CLIPSetLastLayer", "EmptyLatentImage", "CheckpointLoaderSimple",
    "VAELoader", "VAEDecode", "VAEDecodeTiled", "VAEEncode", "VAEEncodeTiled", "LoadImage", "LoadImageMask",
    "SaveImage", "PreviewImage", "PrimitiveNode", "Note", "Reroute",
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    name: str
    kind: str
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Graph:
    """The nodes of a workflow, by their names."""

    nodes: dict[str, Node]

    def linked(self, value: object) -> Node | None:
        """The node a link [id, slot] comes from; None where the value is no link."""
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int):
            return self.nodes.get(str(value[0]))
        return None

    def value(self, node: Node, name: str) -> Any:
        """What an input holds, through nodes that hold one value. A link in a circle holds nothing."""
        value, seen = node.inputs.get(name), set()
        while (source := self.linked(value)) is not None and source.name not in seen:
            seen.add(source.name)
            value = next((source.inputs[key] for key in (name, *CONTENTS) if key in source.inputs), None)
        return None if isinstance(value, list) else value

    def upstream(self, node: Node, name: str) -> Iterator[Node]:
        """Every node that an input comes from, the nearest first, each once.

        Not what is behind a prompt, nor behind a sampler but its latents.
        """
        found, seen = [self.linked(node.inputs.get(name))], {node.name}
        for source in found:
            if source is None or source.name in seen:
                continue
            seen.add(source.name)
            yield source
            if source.kind in SAMPLERS:
                found.append(self.linked(source.inputs.get("latent_image")))
            elif source.kind != "CLIPTextEncode":
                found += [self.linked(value) for value in source.inputs.values()]


def parse(text: str) -> Origin:
    """What a graph tells of its first sampler. Raises ImageError, RequestError; names in a warning what is left out.

    ComfyUI draws a batch's noise on the CPU from one generator, which is a seed's own for the first image only.
    """
    graph = _graph(load_object(text, "nodes"))
    passes = [node for node in graph.nodes.values() if node.kind in SAMPLERS]
    if not passes:
        raise ImageError(f"its nodes have no {' or '.join(sorted(SAMPLERS))}")
    *_, first = [passes[0], *(node for node in graph.upstream(passes[0], "latent_image") if node.kind in SAMPLERS)]
    lost = {node.kind for node in graph.nodes.values() if node.kind not in PLAIN}
    lost |= {f"{node.kind} {node.name}" for node in passes if node is not first}
    values = _sampling(graph, first, lost) | _prompts(graph, first, lost) | _latents(graph, first, lost)
    vaes = [node for node in graph.nodes.values() if node.kind == "VAELoader"]
    model = next(
        (graph.value(node, "ckpt_name") for node in graph.upstream(first, "model") if "ckpt_name" in node.inputs), None
    )
    warn_lost(printable(name) for name in lost)
    return Origin(
        Request(**{name: value for name, value in values.items() if value is not None}),
        stem(model),
        stem(graph.value(vaes[0], "vae_name")) if vaes else None,
        any(node.kind in MASKING for node in graph.upstream(first, "latent_image")),
    )


def _graph(values: dict[str, Any]) -> Graph:
    nodes = {}
    for name, node in values.items():
        match node:
            case {"class_type": str(kind), "inputs": dict(inputs)}:
                nodes[name] = Node(name, kind, inputs)
    return Graph(nodes)


def _sampling(graph: Graph, node: Node, lost: set[str]) -> dict[str, Any]:
    sampler, schedule = (graph.value(node, name) for name in ("sampler_name", "scheduler"))
    if isinstance(sampler, str):
        sampler = sampler.removesuffix("_gpu")
        sampler = "euler" if sampler == "ddim" else sampler  # which is what ComfyUI runs under that name
    sampler, _ = find_sampler(sampler)
    if samplers.SAMPLERS[sampler].eta and not draws_brownian(sampler):
        lost.add(f"the noise of {sampler}'s steps, which ComfyUI draws on the GPU")
    if node.kind == "KSamplerAdvanced":
        seed, usual = "noise_seed", {"start_at_step": 0, "add_noise": "enable"}
        lost |= {name for name, value in usual.items() if graph.value(node, name) not in (None, value)}
        steps, end = (graph.value(node, name) for name in ("steps", "end_at_step"))
        if isinstance(steps, int) and isinstance(end, int) and end < steps:
            lost.add("end_at_step")
    else:
        seed = "seed"
    return {
        "sampler": sampler,
        "schedule": find_grid(schedule) if isinstance(schedule, str) else None,
        "brownian": draws_brownian(sampler),
        "seed": graph.value(node, seed),
        "steps": graph.value(node, "steps"),
        "cfg_scale": graph.value(node, "cfg"),
    }


def _prompts(graph: Graph, sampler: Node, lost: set[str]) -> dict[str, Any]:
    """Both texts, and the clip_skip that the first was encoded with."""
    values: dict[str, Any] = {}
    for name, field in (("positive", "prompt"), ("negative", "negative_prompt")):
        encoders = [node for node in graph.upstream(sampler, name) if node.kind == "CLIPTextEncode"]
        if not encoders:
            raise ImageError(f"its nodes have no CLIPTextEncode that leads to the {name} prompt")
        values[field] = text = graph.value(encoders[0], "text")
        if not isinstance(text, str):
            raise ImageError(f"its nodes compute the {name} prompt: it cannot be read")
        lost |= {f"CLIPTextEncode {node.name}" for node in encoders[1:]}
        if "(" in text:
            lost.add("weights of words, which ComfyUI applies otherwise")
        if name == "positive":
            ends = (graph.value(node, "stop_at_clip_layer") for node in graph.upstream(encoders[0], "clip"))
            skipped = next((end for end in ends if end is not None), None)
            values["clip_skip"] = -skipped if isinstance(skipped, int) else skipped
    return values


def _latents(graph: Graph, sampler: Node, lost: set[str]) -> dict[str, Any]:
    """The size of empty latents, or the strength where they come from a picture."""
    denoise = graph.value(sampler, "denoise")
    for node in graph.upstream(sampler, "latent_image"):
        if node.kind == "EmptyLatentImage":
            if denoise not in (None, 1):
                lost.add("denoise")
            size = {name: graph.value(node, name) for name in ("width", "height", "batch_size")}
            if isinstance(size["batch_size"], int) and size["batch_size"] > 1:
                lost.add("the noise of the batch's images after the first")
            return size
        if node.kind.startswith("VAEEncode"):
            return {"strength": 1.0 if denoise is None else denoise, "exact_steps": True}
    lost.add("latent_image")
    return {}
