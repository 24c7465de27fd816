"""How the weights move: optimiser, learning-rate schedule, averaged weights."""
from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ssl_gpu.checks import check_fields
from ssl_gpu.muon import SMALLEST, Muon, hidden_matrices
from ssl_gpu.rng import MAX_SEED


class Optimizer(Enum):
    """AdamW; Muon for the matrices inside the network and AdamW for the rest; or Adam with the L2 term inside, as the
    original trained."""

    ADAMW = "adamw"
    MUON = "muon"
    ADAM = "adam"


class Schedule(Enum):
    """Cosine to lr_end over the whole run; or steps: times lr_gamma every lr_every steps."""

    COSINE = "cosine"
    STEP = "step"


class Precision(Enum):
    """auto: bfloat16 autocast on a GPU, and on a CPU that is quicker with it; evaluation is always float32."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    out: the run folder; None for runs/<name of the configuration>-<date>.
    device: auto, cpu, cuda or cuda:N. precision: auto, float32 or bfloat16. compile: torch.compile the network.
    overlap: simulate the next batch beside the step of this one; null: on a GPU, and on CPU cores that share a batch
        (ssl_gpu.lanes) what is random of it. The batches are the same. Without effect on steps that are a CUDA graph.
    graph: the whole step, simulation included, as one CUDA graph, which the CPU starts in one call; null: on a GPU,
        where the step never waits for it: not with exact rooms, nor where the speech did not fit there. The same draws
        and, to roundings, the same steps. What part of a step is simulation is not measured then.
    lanes: on a CPU, into how many parts a batch is dealt (ssl_gpu.lanes), side by side, each on an equal share of
        torch's threads, one at least; best as many as there are cores. null: with max_minutes what is found to be
        quickest, else 1. On as many threads and lanes, and with dropout in one lane, a run of steps alone repeats to
        the bit on a CPU.
    seed: of the weights and of every draw.
    init: weights to start from: `packaged`, the folder of a run, its checkpoint, or a folder of ssl_gpu.pretrained;
        null: drawn from the seed. The steps count on from theirs, so that with the same seed no room comes twice, but
        for those of a bank.
    steps, max_minutes: the length of the run, at least one of them. steps does not count those before init.
        max_minutes counts wall-clock time from the start of the process to result.json: the schedule fits itself to it.
    batch_size: mixtures per step.
    optimizer: adamw, muon or adam, see Optimizer; muon needs matrices of 64 rows and columns, so a model.dim of 64.
    lr, weight_decay, clip_norm (None: no clipping): the usual; with muon lr and weight_decay are those of both.
    warmup: the share of the run over which the rate rises linearly to lr.
    noise_warmup: the share of the run over which the part of noisy examples rises linearly from 0 to
        mixture.noise_probability.
    schedule, lr_end (share of lr that the cosine ends at), lr_every, lr_gamma: see Schedule.
    ema: decay of the averaged weights, which are then the ones evaluated; None for none.
    evaluations: how often to evaluate, evenly over the run, the last one at its end; with max_minutes less often where
        those on the way would take more than a tenth of them.
    log_every: steps between two lines of metrics.jsonl. checkpoint_minutes: time between two checkpoints.

    Raises ValueError naming the field, its value and the rule.
    """

    out: str | None = None
    device: str = "auto"
    precision: Precision = Precision.AUTO
    compile: bool = False
    overlap: bool | None = None
    graph: bool | None = None
    lanes: int | None = None
    seed: int = 0
    init: str | None = None
    steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 32
    optimizer: Optimizer = Optimizer.ADAMW
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    noise_warmup: float = 0.0
    clip_norm: float | None = 1.0
    schedule: Schedule = Schedule.COSINE
    lr_end: float = 0.02
    lr_every: int = 200
    lr_gamma: float = 0.2
    ema: float | None = 0.99
    evaluations: int = 4
    log_every: int = 10
    checkpoint_minutes: float = 5.0

    def __post_init__(self):
        check_fields(self, "train")
        if self.steps is None and self.max_minutes is None:
            raise ValueError("train.steps or train.max_minutes must be given, got null for both")
        for name in ("batch_size", "lr_every", "evaluations", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("steps", "lanes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be >= 1, got {getattr(self, name)}")
        if self.lanes is not None and self.lanes > self.batch_size:
            raise ValueError(f"train.lanes must be at most train.batch_size={self.batch_size}, got {self.lanes}")
        for name in ("lr", "max_minutes", "clip_norm", "checkpoint_minutes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"train.{name} must be > 0, got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"train.weight_decay must be >= 0, got {self.weight_decay}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"train.seed must satisfy 0 <= seed <= {MAX_SEED}, got {self.seed}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"train.ema must satisfy 0 <= decay < 1, got {self.ema}")
        for name in ("warmup", "noise_warmup", "lr_end", "lr_gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train.{name} must be in [0, 1], got {getattr(self, name)}")


class Together:
    """Optimisers of different weights of one model, by name, as one: what a training loop needs of it."""

    def __init__(self, **parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all parts."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients."""
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def step(self) -> None:
        """One step of every part."""
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """State dicts by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}


def build_optimizer(cfg: TrainConfig, model: nn.Module) -> torch.optim.Optimizer | Together:
    """The optimiser over all parameters that train. AdamW spares biases, norms and other vectors the weight decay;
    Adam's L2 term covers everything, as in the original. For Optimizer.MUON, Muon takes the hidden_matrices and AdamW
    the rest.

    Adams are fused, on a GPU and on a CPU: one pass over weights, gradient and moments. For the 57 M parameters of the
    original and one CPU thread 36 ms instead of 116 in a loop and 147 by foreach."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if cfg.optimizer is Optimizer.ADAM:
        return torch.optim.Adam(trained, cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    matrices = hidden_matrices(model) if cfg.optimizer is Optimizer.MUON else []
    if cfg.optimizer is Optimizer.MUON and not matrices:
        raise ValueError(f"train.optimizer=muon needs a network with matrices of at least {SMALLEST} rows and columns "
                         "inside, as with model.dim >= 64, got one without")
    taken = {id(weight) for weight in matrices}
    rest = [p for p in trained if id(p) not in taken]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, cfg.lr, betas=(0.9, 0.98), fused=True)
    return Together(adamw=adamw, muon=Muon(matrices, cfg.lr, weight_decay=cfg.weight_decay)) if matrices else adamw


def restore_optimizer(optimizer: torch.optim.Optimizer | Together, state: Mapping[str, Any]) -> None:
    """Loads the state dict of an earlier run; weight decay, rate, and whether it is fused, stay as build_optimizer made
    it, and what rate_on_device changed as that did.

    Raises what torch raises for a state that does not fit, KeyError and TypeError for what is none, as one with Muon is
    where there is none now, or the other way round; run.check_optimizer has a line for the user.
    """
    if isinstance(optimizer, Together):
        for name, part in optimizer.parts.items():
            restore_optimizer(part, state[name])
        return
    # Loading takes all saved options. fused decides where the counts of steps are kept, so it is set before; Muon has
    # no such choice. The rate is set at every step, the decay is not; of a run with train.graph the rate is a tensor.
    kept = {"fused", "weight_decay", "lr", "capturable"} & optimizer.defaults.keys()
    groups, own = list(state["param_groups"]), optimizer.param_groups  # of other lengths, torch refuses them
    for index, (then, now) in enumerate(zip(groups, own)):
        groups[index] = {**then, **{name: now[name] for name in kept}}
    rates = [group["lr"] for group in own]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group, rate in zip(optimizer.param_groups, rates):              # loading copied it, and a graph reads this one
        group["lr"] = rate


def rate_on_device(optimizer: torch.optim.Optimizer | Together, device: torch.device) -> Tensor:
    """The learning rate as a tensor [] float32 on `device`, that of the weights, which every step from now on reads:
    fill_ changes it for a CUDA graph of a step, which would keep a number as it was. 0 at first."""
    rate = torch.zeros((), device=device)
    for group in optimizer.param_groups:
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = True
    for part in optimizer.parts.values() if isinstance(optimizer, Together) else (optimizer,):
        # Or torch warns at the first step that is not captured, and a graph is warmed up with some.
        part._warned_capturable_if_run_uncaptured = True
    return rate


def noise_share(cfg: TrainConfig, progress: float) -> float:
    """Factor of mixture.noise_probability, in [0, 1]; progress in [0, 1] is the share of the run that is over."""
    return min(1.0, progress / cfg.noise_warmup) if cfg.noise_warmup > 0 else 1.0


def learning_rate(cfg: TrainConfig, step: int, progress: float) -> float:
    """The rate of step `step` (from 0); progress in [0, 1] is the share of the run that is over, by steps or time."""
    # A run of unknown speed knows its progress, not its number of steps; the 0.001 lets the first step move.
    warmup = min(1.0, (progress + 1e-3) / cfg.warmup) if cfg.warmup > 0 else 1.0
    if cfg.schedule is Schedule.STEP:
        return cfg.lr * warmup * cfg.lr_gamma ** (step // cfg.lr_every)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return cfg.lr * warmup * (cfg.lr_end + (1 - cfg.lr_end) * cosine)


class Averaged:
    """Exponentially averaged weights of a model: decay min(ema, (1 + n) / (10 + n)) at update n, so that the first
    weights, which know nothing, are forgotten quickly. Buffers are copied."""

    def __init__(self, model: nn.Module, decay: float, updates: int = 0):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.updates = decay, updates

    def next_weight(self) -> float:
        """How much the model counts in the next update, 1 - decay; which counts that update."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        return 1 - decay

    @torch.no_grad()
    def update(self, model: nn.Module, weight: Tensor | None = None) -> None:
        """One step of averaging. weight: the next_weight, as a tensor [] on the device, where a CUDA graph is to read
        it; None: update asks for it itself."""
        mine, theirs = list(self.model.parameters()), list(model.parameters())
        if weight is None:
            torch._foreach_lerp_(mine, theirs, self.next_weight())
        else:                                                           # for tensors lerp would take them one by one
            change = torch._foreach_sub(theirs, mine)
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(mine, change)
        for mine, theirs in zip(self.model.buffers(), model.buffers()):
            mine.copy_(theirs)
