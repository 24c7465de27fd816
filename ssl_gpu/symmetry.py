"""A network whose answer to a mirrored clip is the mirrored answer, whatever it has learned.

Two microphones that change places hear every angle a as pi - a. A network of which that is true by its weights learns
from every clip what it would from the mirrored one, and need not hear both. Channels come in two halves that change
places in the mirror; what is told of bins, the delays, the masks and the answers have mirror images of their own. A
layer keeps the symmetry where its weights, with outputs and inputs mirrored, are the same weights (Cohen and Welling
2016, "Group equivariant convolutional networks", ICML, here of the group of two elements; Ravanbakhsh, Schneider and
Poczos 2017, "Equivariance through parameter-sharing", ICML). Norms of a token, activations and attention, whose heads
come in two halves, keep it as they are. So the network computes what it would without: about half as many weights are
free, and who trains it keeps them so at every step (`Mirror.keep`).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ssl_gpu.masks import OF_FRAME, PER_BIN, MaskNetwork
from ssl_gpu.patches import BINS, FRAMES, PatchNetwork

Action = Callable[[Tensor, int], Tensor]  # a tensor and a dimension: what the mirror makes of it, along that alone
Actions = dict[str, tuple[Action, ...]]   # by the names of a network's weights, an action for each dimension


def same(x: Tensor, dim: int) -> Tensor:
    """What the mirror does not change: levels, bands, frames, frequencies."""
    return x


def opposite(x: Tensor, dim: int) -> Tensor:
    """The sine of a phase difference."""
    return -x


def halves(x: Tensor, dim: int) -> Tensor:
    """Channels, and whatever stands for them: the second half changes places with the first."""
    if x.shape[dim] % 2:
        raise ValueError(f"what has halves must have an even size, got {x.shape[dim]}")
    return x.roll(x.shape[dim] // 2, dim)


def ends(x: Tensor, dim: int) -> Tensor:
    """Delays; and logits of the answers, [track * angle], of which the last is the image of the first."""
    return x.flip(dim)


def one_by_one(*parts: tuple[int, Action]) -> Action:
    """Of a dimension of parts, one behind the other: (size, action) of each."""
    def action(x: Tensor, dim: int) -> Tensor:
        return torch.cat([act(part, dim) for part, (_, act) in
                          zip(x.split([size for size, _ in parts], dim), parts)], dim)
    return action


def each(outer: tuple[int, Action], inner: Action) -> Action:
    """Of a dimension that two were flattened to: (size, action) of the outer, action of the inner one."""
    def action(x: Tensor, dim: int) -> Tensor:
        x = x.unflatten(dim, (outer[0], -1))
        return inner(outer[1](x, dim), dim + 1).flatten(dim, dim + 1)
    return action


def twice(x: Tensor, dim: int) -> Tensor:
    """Two lots of channels, one behind the other, as of keys and values."""
    return each((2, same), halves)(x, dim)


def mirrored_masks(number: int) -> Action:
    """Of masks: the others are each other's images, two and two, behind the first, which the truth teaches and which is
    its own, and one more such where an odd number of others leaves one."""
    pairs = (number - 1) // 2
    return one_by_one((number - 2 * pairs, same), *[(2, ends)] * pairs)


class Mirror(nn.Module):
    """The mirror images of the weights of one network, as places and signs in all of them one behind the other.

    actions: by the names of weights, for each dimension that the mirror changes anything along what it does. Weights
    that it does not name are left alone. network is not kept.
    Raises AttributeError for a name that is no weight's, ValueError for a size that has no halves.
    """

    def __init__(self, network: nn.Module, actions: Actions):
        super().__init__()
        self.names, places, begin = tuple(actions), [], 1
        for name in self.names:
            weight = network.get_parameter(name)
            place = torch.arange(begin, begin + weight.numel()).view(weight.shape)
            for dim, action in enumerate(actions[name]):
                place = action(place, dim)
            places.append(place.flatten())                              # from 1 on, so that all have a sign
            begin += weight.numel()
        places = torch.cat(places)
        self.register_buffer("place", places.abs() - 1, persistent=False)
        self.register_buffer("sign", places.sign().float(), persistent=False)

    def of(self, network: nn.Module) -> list[nn.Parameter]:
        """The weights that it is of, in a network or in its copy."""
        return [network.get_parameter(name) for name in self.names]

    def image(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of tensors of the shapes of `of`, their images."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        flat = flat.index_select(0, self.place) * self.sign
        return [part.view_as(tensor) for part, tensor in
                zip(flat.split([tensor.numel() for tensor in tensors]), tensors)]

    @torch.no_grad()
    def begin(self, weights: Sequence[Tensor]) -> None:
        """Makes weights that have just been drawn their own images, in place. The mean of two that were drawn has half
        of their variance, which is made up for; what is its own image already, as a norm's weights are, stays."""
        for weight, image in zip(weights, self.image(weights)):
            weight.copy_(torch.where(weight == image, weight, (weight + image) / math.sqrt(2)))

    @torch.no_grad()
    def keep(self, tensors: Sequence[Tensor]) -> None:
        """Makes tensors the means of what they are and of their images, in place: the gradients, before the optimiser
        takes its step by them, as Muon's step by a mean is not the mean of two steps; and the weights behind it, for
        the roundings of the step."""
        tensors = list(tensors)
        torch._foreach_add_(tensors, self.image(tensors))               # not lerp: of two images one would be rounded
        torch._foreach_mul_(tensors, 0.5)                               # otherwise than the other


TOLD = one_by_one((3, same), (1, opposite), (PER_BIN - 4, same))  # masks.told: levels and a cosine, the sine, coherence


def of_norm(name: str) -> Actions:
    """Weight and bias of a norm over channels."""
    return {f"{name}.weight": (halves,), f"{name}.bias": (halves,)}


def of_layer(name: str, out: Action, inp: Action, *rest: Action, bias: bool = True) -> Actions:
    """A linear layer's or a convolution's: actions on what it gives, on what it takes, and on the taps of a filter."""
    return {f"{name}.weight": (out, inp, *rest)} | ({f"{name}.bias": (out,)} if bias else {})


def of_patches(network: PatchNetwork) -> Actions:
    """Of every weight of a network of patches."""
    freq, three = len(network.place), each((3, same), halves)
    in_frame = each((freq, same), halves)
    found = {"place": (same, halves)} | of_norm("norm") | of_layer("first", halves, each((FRAMES * BINS, same), TOLD))
    found |= of_layer("last", each((network.num_masks, mirrored_masks(network.num_masks)), same), halves)
    for index in range(len(network.blocks)):
        for norms, number in (("norms", 3), ("frame_norms", 2)):
            for k in range(number):
                found |= of_norm(f"blocks.{index}.{norms}.{k}")
        for name, out, inp in (("in_time", halves, three), ("in_freq", halves, three), ("squeeze", halves, halves),
                               ("to_frame", halves, in_frame), ("frame", halves, three),
                               ("from_frame", in_frame, halves), ("widen", halves, halves),
                               ("weigh", halves, halves), ("clip", halves, halves)):
            found |= of_layer(f"blocks.{index}.{name}", out, inp)
    return found


def of_frames(network: MaskNetwork) -> Actions:
    """Of every weight of a network for masks that hears a frame at once."""
    found = of_layer("first", halves, each((PER_BIN, TOLD), same)) | of_layer("said", same, halves)
    found |= of_layer("near", halves, one_by_one((PER_BIN, TOLD), (OF_FRAME, same))) | of_layer("last", same, halves)
    for index in range(len(network.convs)):
        found |= of_norm(f"norms.{index}") | of_layer(f"convs.{index}", halves, each((3, same), halves))
    return found


def of_conformer(backbone: nn.Module) -> Actions:
    """Of every weight of a Conformer but the table of its relative positions, which all heads share."""
    found: Actions = {}
    for name, module in backbone.named_modules():
        if isinstance(module, nn.LayerNorm):
            found |= of_norm(name)
        elif isinstance(module, nn.Linear):
            out = twice if name.endswith("to_kv") else halves
            found |= of_layer(name, out, halves, bias=module.bias is not None)
        elif isinstance(module, nn.Conv1d):                              # what a GLU halves, filters of one channel
            out = twice if module.out_channels > module.in_channels else halves
            found |= of_layer(name, out, same if module.groups > 1 else halves)
    return found


def of_localizer(network: nn.Module) -> Actions:
    """Of every weight of a model.ConformerLocalizer but those of its gate, which hears nothing that the mirror changes,
    and of what such parts share."""
    bands, number = network.level_sizes[0], getattr(network.mask, "num_masks", int(network.mask is not None))
    masks = each((number, mirrored_masks(number)), same) if number else same
    masked = [(number * bands, masks)] if number else []
    found = {f"backbone.{name}": action for name, action in of_conformer(network.backbone).items()}
    if number:
        of_masks = (of_patches if isinstance(network.mask, PatchNetwork) else of_frames)(network.mask)
        found |= {f"mask.{name}": action for name, action in of_masks.items()}
    if network.of_bins is not None:
        found |= of_layer("of_bins", halves, halves)
    for index, inp in enumerate((one_by_one((2 * bands, same), *masked), halves, halves)):
        found |= of_layer(f"conv.{3 * index}", halves, inp, same, ends) | of_norm(f"conv.{3 * index + 1}")
    found |= of_layer("fold", halves, each((network.conv[0].out_channels, halves), ends))
    found |= of_layer("level", halves, one_by_one((bands, same), *masked))
    found |= of_layer("pool_weight", halves, halves) | of_layer("pool_value", halves, halves)
    return found | of_layer("head.0", halves, twice) | of_layer("head.2", ends, halves)
