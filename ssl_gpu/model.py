"""The networks: a two-microphone waveform to the logits of two sorted azimuth classes."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssl_gpu import products, runtime, symmetry
from ssl_gpu.checks import check_fields
from ssl_gpu.conformer import Conformer, ConvNorm
from ssl_gpu.features import DelayMap, FeatureConfig
from ssl_gpu.masks import MaskNetwork, mask_loss
from ssl_gpu.patches import FRAMES, PatchNetwork

WINDOW = 512  # samples, 32 ms at 16 kHz
HOP = 160  # samples, 10 ms at 16 kHz
NUM_BINS = WINDOW // 2 + 1
STEP_FRAMES = 64  # frames in one time step of the original's tokens, and bins in one of its bands
HANN_ERROR = 1e-6  # of weights of at most 1 that still count as the Hann transform's; float32 has 6e-8
PRODUCT_WIDTH = 64  # outputs in a row of the products that stand for 3 x 3 convolutions: 16 bins of 4 maps, 8 of 8
SILENCE = 1e-16  # |X0 X1|: two spectra of 1e-8, made by samples of 7e-10; the last of 24 bits is 1.2e-7


def hann_transform() -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the 512-point periodic Hann transform, [freq=257, 1, sample=512] float64."""
    sample = torch.arange(WINDOW, dtype=torch.float64)
    phase = 2 * math.pi / WINDOW * (torch.outer(sample[:NUM_BINS], sample) % WINDOW)
    window = torch.hann_window(WINDOW, dtype=torch.float64)
    return (phase.cos() * window)[:, None], (-phase.sin() * window)[:, None]


class STFT(nn.Module):
    """Short-time spectra by two strided convolutions, so that their window and frequencies can be trained.

    Starts as a 512-point periodic Hann transform every 160 samples, the signal reflected at both ends to centre frame t
    on sample 160 t: torch.stft with center=True. With `frozen` set its weights do not train, and while they are those
    of that transform it is computed by FFT, without them. Trained ones that load_state_dict brings into a frozen
    transform are convolved with as ever. To change the weights otherwise is to be told of: call `choose_path` then.
    """

    def __init__(self, frozen: bool = False):
        super().__init__()
        self.conv_real = nn.Conv1d(1, NUM_BINS, WINDOW, HOP, bias=False)
        self.conv_imag = nn.Conv1d(1, NUM_BINS, WINDOW, HOP, bias=False)
        with torch.no_grad():
            for conv, weight in zip((self.conv_real, self.conv_imag), hann_transform()):
                conv.weight.copy_(weight)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.frozen = self.by_fft = frozen
        self.requires_grad_(not frozen)
        self.register_load_state_dict_post_hook(STFT.choose_path)

    def choose_path(self, *_) -> None:
        """Decides, outside of forward since it waits for the device, whether an FFT can stand in for the weights."""
        convs = (self.conv_real, self.conv_imag)
        self.by_fft = self.frozen and all(float((conv.weight - weight.to(conv.weight)).abs().max()) <= HANN_ERROR
                                          for conv, weight in zip(convs, hann_transform()))

    def forward(self, audio: Tensor, first_bin: int = 0) -> tuple[Tensor, Tensor]:
        """audio [batch, mic, sample >= 257] -> real and imaginary part, each [batch, mic, frame, freq=257 - first_bin].
        """
        if self.by_fft:
            spectrum = torch.stft(audio.flatten(0, 1), WINDOW, HOP, window=self.window, pad_mode="reflect",
                                  return_complex=True)
            spectrum = rearrange(spectrum, "(b m) f t -> b m t f", m=audio.shape[1])
            return spectrum.real[..., first_bin:], spectrum.imag[..., first_bin:]
        signal = F.pad(audio.flatten(0, 1)[:, None], (WINDOW // 2, WINDOW // 2), mode="reflect")
        if runtime.prefers_products(audio.device):
            # Of 2048 signals of 3 s in float32 on an H200: 9.9 ms, and 19 with the gradient; by cuDNN 35.5 and 51. And
            # without bin 0 it is 512 columns, which fill 4 tiles of 128 instead of 5.
            weight = torch.cat((self.conv_real.weight[first_bin:, 0], self.conv_imag.weight[first_bin:, 0]))
            frames = signal.unfold(-1, WINDOW, HOP).unflatten(0, audio.shape[:2]).squeeze(2)
            real, imag = F.linear(frames, weight).chunk(2, -1)
            return real, imag
        parts = self.conv_real(signal), self.conv_imag(signal)
        real, imag = (rearrange(part, "(b m) f t -> b m t f", m=audio.shape[1]) for part in parts)
        return real[..., first_bin:], imag[..., first_bin:]


def phase_difference(real: Tensor, imag: Tensor) -> Tensor:
    """Cosine and sine of phase(mic 1) - phase(mic 0): real, imag [batch, 2, frame, freq] -> [batch, 2, frame, freq].

    The normalised cross-spectrum X1 conj(X0) / |X1 X0|: no angle, so no jump at pi, and finite gradients. Where
    |X1 X0| < SILENCE, as when one microphone is digitally silent, the cosine is 1, the sine 0 and the gradient zero.
    """
    real0, real1 = real.unbind(1)
    imag0, imag1 = imag.unbind(1)
    cross_real = real1 * real0 + imag1 * imag0
    cross_imag = imag1 * real0 - real1 * imag0
    power = cross_real.square() + cross_imag.square()
    silent = power < SILENCE**2
    # A root and a division, not rsqrt: its derivative, power^-1.5, is infinite in float32 below a power of 1e-26. And
    # their inputs are replaced too: an infinite derivative times the zero of an outer where() would be NaN.
    magnitude = torch.where(silent, 1.0, power).sqrt()
    cosine = torch.where(silent, 1.0, cross_real / magnitude)
    sine = torch.where(silent, 0.0, cross_imag / magnitude)
    return torch.stack((cosine, sine), dim=1)


def truncated_normal(weight: Tensor) -> None:
    """Fill weight, any shape, in place: standard deviation 0.02 as in the original, cut at 5 of them."""
    # trunc_normal_'s own limits, -2 and 2, lie so far out that float32 draws the limit itself: of 50 million weights
    # two became -2, a hundred standard deviations.
    nn.init.trunc_normal_(weight, std=0.02, a=-0.1, b=0.1)


def init_linear(module: nn.Module) -> None:
    """For nn.Module.apply: truncated normal weights and zero biases of linear layers."""
    if isinstance(module, nn.Linear):
        truncated_normal(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class SSLModel(nn.Module):
    """The original system's network, 57,102,224 parameters: the modules and state-dict keys of its printed model.

    audio [batch, mic=2, sample] at 16 kHz -> (low, high), logits [batch, num_classes] of the smaller and the larger
    azimuth class. Phase differences of bins 1..256 shrink 64-fold in time and in frequency to 4 tokens for every 64
    frames (0.64 s), ordered time * 4 + band behind one CLS token per answer. Frames past the last full 64 are dropped;
    of the audio behind them only 2 frames still reach the tokens, through the 3 x 3 convolutions (in eval mode; in
    training they also count in the batch norm statistics).

    The three dropouts arrive in every block; the original's were lost on the way, hence the default 0. freeze_stft
    keeps the transform as it is, by FFT while it is the Hann transform. channels_last: layout of the convolutions' maps
    in memory; None leaves it to runtime.channels_last.

    Raises ValueError for a wrong dropout; forward for anything but two microphones, for fewer than 10,080 samples (one
    time step) and for more than 1,310,559 (512 tokens).
    """

    shortest = (STEP_FRAMES - 1) * HOP  # samples

    def __init__(
        self,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        conv_dropout: float = 0.0,
        num_classes: int = 36,
        freeze_stft: bool = False,
        channels_last: bool | None = None,
    ):
        super().__init__()
        self.channels_last = channels_last
        self.stft = STFT(freeze_stft)
        self.inter_conv = nn.Sequential(*_conv_norm_gelu(2, 4, 3, 1, 1), *_conv_norm_gelu(4, 8, 3, 1, 1))
        self.patch_embed = nn.Sequential(
            *_conv_norm_gelu(8, 32, 4, 4, 0), *_conv_norm_gelu(32, 128, 4, 4, 0), *_conv_norm_gelu(128, 512, 4, 4, 0)
        )
        self.cls_token = nn.Parameter(torch.empty(1, 2, 512))
        self.pos_embed = nn.Parameter(torch.empty(1, 512, 512))
        self.backbone = Conformer(
            512, depth=8, attn_dropout=attn_dropout, ff_dropout=ff_dropout, conv_dropout=conv_dropout
        )
        self.norm = nn.LayerNorm(512)
        self.head = nn.Linear(512, num_classes)
        truncated_normal(self.cls_token)
        truncated_normal(self.pos_embed)
        self.apply(init_linear)

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        self._check(audio)
        x = self.embed(self.features(audio))  # [batch, 512, time, band]
        x = rearrange(x, "b c t f -> b (t f) c")
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = self.norm(self.backbone(x + self.pos_embed[:, : x.shape[1]]))
        low, high = self.head(x[:, :2]).unbind(1)
        return low, high

    def features(self, audio: Tensor) -> Tensor:
        """audio [batch, 2, sample] -> cosine and sine of the phase difference, [batch, 2, frame, 256], bins 1..256."""
        # Not in bfloat16: of two mixed utterances it moves 13 % of the phase differences by over 0.1 rad, float32 none.
        with runtime.autocast(audio.device, False):
            return phase_difference(*self.stft(audio, first_bin=1))

    def embed(self, maps: Tensor) -> Tensor:
        """Maps [batch, 2, frame, 256] -> [batch, 512, frame // 64, 4]; with channels last on a GPU, by products."""
        if self.channels_last is False or not runtime.prefers_products(maps.device):
            return self.patch_embed(self.inter_conv(runtime.channels_last(maps, self.channels_last)))
        for conv, norm, gelu in _triples(self.inter_conv):
            maps = gelu(norm(products.conv3x3(maps, conv.weight, conv.bias, PRODUCT_WIDTH // conv.out_channels)))
        for conv, norm, gelu in _triples(self.patch_embed):
            maps = gelu(norm(products.patches(maps, conv.weight, conv.bias)))
        return maps

    def _check(self, audio: Tensor) -> None:
        if audio.ndim != 3 or audio.shape[1] != 2:
            raise ValueError(f"audio must be [batch, mic=2, sample], got shape {list(audio.shape)}")
        samples = audio.shape[-1]
        if samples < self.shortest:
            raise ValueError(f"audio must have at least {self.shortest} samples (64 frames), got {samples}")
        steps = (1 + samples // HOP) // STEP_FRAMES
        tokens, room = 2 + 4 * steps, self.pos_embed.shape[1]
        if tokens > room:
            longest = ((room - 2) // 4 + 1) * STEP_FRAMES * HOP - HOP - 1
            raise ValueError(f"audio must give at most {room} tokens ({longest} samples), got {tokens} ({samples})")


def _conv_norm_gelu(channels_in: int, channels_out: int, kernel: int, stride: int, padding: int) -> tuple:
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding)
    return conv, nn.BatchNorm2d(channels_out), nn.GELU()


def _triples(layers: nn.Sequential) -> list[tuple[nn.Module, ...]]:
    """Convolution, norm and GELU of each step, as _conv_norm_gelu and _conv_group_norm_gelu made them."""
    layers = list(layers)
    return list(zip(layers[::3], layers[1::3], layers[2::3]))


class ModelKind(Enum):
    """The small Conformer, or the original's 57 M network."""

    CONFORMER = "conformer"
    ORIGINAL = "original"


@dataclass(frozen=True)
class ModelConfig:
    """Which network, and the sizes of the small one.

    kind: conformer or original. dropout: in every Conformer block, of either kind.
    freeze_stft: of the original, keep its transform at the Hann window instead of training it, by one FFT.
    channels_last: of the original, how the maps of its convolutions lie in memory; null: channels last on a GPU, not on
        a CPU; on a GPU the convolutions are then products of matrices. It changes roundings alone. The small one has
        group norm, which would undo it on a GPU.
    channels: maps of the convolutions over frame and delay.
    dim, depth, heads, conv_kernel: width, blocks, attention heads and kernel (in frames of 32 ms) of the Conformer.
    symmetric: of the small one, answer a mirrored clip by the mirrored answer, by the weights (ssl_gpu.symmetry), of
        which about half as many are then free; target.mirror changes nothing any more. channels, heads and
        features.mask_width must then be even, features.num_delays odd.

    Raises ValueError naming the field, its value and the rule.
    """

    kind: ModelKind = ModelKind.CONFORMER
    dropout: float = 0.0
    freeze_stft: bool = False
    channels_last: bool | None = None
    channels: int = 24
    dim: int = 128
    depth: int = 3
    heads: int = 4
    conv_kernel: int = 15
    symmetric: bool = False

    def __post_init__(self):
        check_fields(self, "model")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must satisfy 0 <= p < 1, got {self.dropout}")
        if self.freeze_stft and self.kind is not ModelKind.ORIGINAL:
            raise ValueError(f"model.freeze_stft must be false unless model.kind is original, got true with "
                             f"{self.kind.value}")
        if self.channels_last is not None and self.kind is not ModelKind.ORIGINAL:
            raise ValueError(f"model.channels_last must be null unless model.kind is original, got "
                             f"{str(self.channels_last).lower()} with {self.kind.value}")
        for name in ("channels", "dim", "depth", "heads", "conv_kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be >= 1, got {getattr(self, name)}")
        if self.symmetric and self.kind is not ModelKind.CONFORMER:
            raise ValueError(f"model.symmetric must be false unless model.kind is conformer, got true with "
                             f"{self.kind.value}")
        for name in ("channels", "heads"):
            if self.symmetric and getattr(self, name) % 2:
                raise ValueError(f"model.{name} must be even with model.symmetric=true, got {getattr(self, name)}")
        if self.dim % self.heads or self.dim % POOL_HEADS:
            raise ValueError(f"model.dim must be divisible by model.heads and by {POOL_HEADS}, "
                             f"got {self.dim} and {self.heads}")


def shortest_clip(model: ModelConfig, features: FeatureConfig) -> int:
    """Samples of the shortest clip that the network takes: a time step of the original's, a window of the small one."""
    return SSLModel.shortest if model.kind is ModelKind.ORIGINAL else features.window


FRAME_HOPS = FRAMES  # of the transform, from one frame of the ConformerLocalizer's Conformer to the next
GATE_WIDTH = 64  # channels inside the gate of ConformerLocalizer
POOL_HEADS = 8  # weightings of the frames that the pooling of ConformerLocalizer learns


class ConformerLocalizer(nn.Module):
    """The small model: delay maps, three convolutions, a Conformer over frames, and pooling that can pick moments.

    audio [batch, mic=2, sample] -> logits [batch, track, angle].
    A direct path stands alone only for moments, at onsets (max-pooled GCC-PHAT errs half as much as averaged), so the
    frames are kept to the end, one every FRAME_HOPS hops (32 ms at 16 kHz): convolutions over frame and delay clean the
    maps, their channels and delays are folded into the width of the Conformer, and what it says of each frame is pooled
    by learned weightings and by the maximum. With features.gate_bands, a gate multiplies each of the maps at each frame
    by 1 plus what it makes of the levels of so many bands and of how high every map peaks: which band to believe at
    which moment. What it makes of them is 0 at first, so the weights of a network without a gate fit as a beginning. It
    knows the peaks at the spacing of the training: a closer pair is more coherent in low bands, whatever it hears, so
    at another spacing the gate may err. With features.mask_width, a network (ssl_gpu.masks) says which bins hold direct
    sound, and as many maps again, of these bins, stand beside the others; in train mode the output is then the logits
    and those of the masks, [batch, frame, freq], which `mask_loss` is for. With features.patch_width that network is of
    patches (ssl_gpu.patches), and the Conformer also hears what it makes of every frame; with features.free_masks it
    makes so many further masks, with num_bands maps each, and learns from the angles by these and by what it makes of
    frames. Without, the truth alone teaches it. With model.symmetric the logits of a clip whose microphones change
    places are those of the clip, tracks and angles from the last to the first, as long as who trains it makes `mirror`
    (symmetry.Mirror) keep gradients and weights.

    Raises ValueError with model.symmetric for an even number of delays or an odd features.mask_width.
    """

    def __init__(self, cfg: ModelConfig, features: FeatureConfig, sample_rate: int, mic_spacing: float,
                 num_tracks: int, num_angles: int):
        super().__init__()
        self.num_tracks = num_tracks
        self.front = DelayMap(features, sample_rate, mic_spacing)
        self.gate = _gate(features.gate_bands, 2 * features.num_bands) if features.gate_bands else None
        self.mask = self.of_bins = None
        if features.patch_width:
            self.mask = PatchNetwork(self.front.num_bins, features.patch_width, features.patch_blocks,
                                     features.mask_width, 1 + features.free_masks)
            self.of_bins = nn.Linear(features.mask_width, cfg.dim)
        elif features.mask_width:
            self.mask = MaskNetwork(self.front.num_bins, features.mask_width, features.mask_layers)
        self.level_sizes = (features.num_bands, features.gate_bands)
        width, masked = cfg.channels, features.num_bands * (1 + features.free_masks) if features.mask_width else 0
        self.conv = nn.Sequential(
            *_conv_group_norm_gelu(2 * features.num_bands + masked, width, stride=(1, 1)),
            *_conv_group_norm_gelu(width, width, stride=(1, 2)),
            *_conv_group_norm_gelu(width, width, stride=(FRAME_HOPS, 1)),
        )
        self.fold = nn.Linear(width * ((features.num_delays + 1) // 2), cfg.dim)
        self.level = nn.Conv1d(features.num_bands + masked, cfg.dim, 3, stride=FRAME_HOPS, padding=1)
        self.backbone = Conformer(cfg.dim, depth=cfg.depth, heads=cfg.heads, dim_head=cfg.dim // cfg.heads,
                                  conv_kernel_size=cfg.conv_kernel, conv_norm=ConvNorm.LAYER,
                                  attn_dropout=cfg.dropout, ff_dropout=cfg.dropout, conv_dropout=cfg.dropout)
        self.pool_weight = nn.Linear(cfg.dim, POOL_HEADS)
        self.pool_value = nn.Linear(cfg.dim, cfg.dim)
        self.head = nn.Sequential(nn.Linear(2 * cfg.dim, 2 * cfg.dim), nn.GELU(),
                                  nn.Linear(2 * cfg.dim, num_tracks * num_angles))
        self.mirror = None
        if cfg.symmetric:
            if not features.num_delays % 2 or features.mask_width % 2:
                raise ValueError(f"features.num_delays must be odd and features.mask_width even with "
                                 f"model.symmetric=true, got {features.num_delays} and {features.mask_width}")
            mirror = symmetry.Mirror(self, symmetry.of_localizer(self))
            mirror.begin(mirror.of(self))
            self.mirror = mirror

    def forward(self, audio: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        maps, levels, spectra, phat = self.front.hear(audio)
        if self.gate is not None:
            levels, heard = levels.split(self.level_sizes, 1)
            factor = self.gate(torch.cat((heard, maps.amax(-1)), 1))[..., None]
            maps = torch.addcmul(maps, maps, factor)                     # 1 + factor in bfloat16 would lose small ones
        mask, free, of_frames = self._masks(spectra, phat)
        # The mask that the truth teaches learns nothing from its own maps: in noise the gradient of the angles is 35
        # times that of the masks' loss. Masks of frames taught by both explained 12 % of the true ones after 7,000
        # mixtures, by the truth alone 31 (docs/masks.md).
        for logits in () if mask is None else (mask.detach(), *free):
            masked, share = self.front.masked(phat, logits.sigmoid())
            maps, levels = torch.cat((maps, masked), 1), torch.cat((levels, share), 1)
        x = rearrange(self._convolved(maps), "b c t d -> b t (c d)")
        x = self.fold(x) + self.level(levels).transpose(1, 2)
        if of_frames is not None:
            x = x + self.of_bins(of_frames)
        x = self.backbone(x)                                             # [batch, frame, dim]
        weight = self.pool_weight(x).softmax(1)                          # over frames
        value = rearrange(self.pool_value(x), "b t (h e) -> b t h e", h=POOL_HEADS)
        picked = torch.einsum("bth,bthe->bhe", weight, value).flatten(1)
        logits = self.head(torch.cat((picked, x.amax(1)), -1))
        logits = rearrange(logits, "b (k a) -> b k a", k=self.num_tracks)
        return logits if mask is None or not self.training else (logits, mask)

    def _masks(self, spectra: Tensor, phat: Tensor) -> tuple[Tensor | None, Sequence[Tensor], Tensor | None]:
        """Logits of the mask that the truth teaches and of those that it does not, each [batch, frame, freq], and what
        patches say of every frame of the Conformer."""
        if self.mask is None:
            return None, (), None
        if self.of_bins is None:
            return self.mask(spectra, phat), (), None
        masks, of_frames = self.mask(spectra, phat)
        mask, *free = masks.unbind(1)
        return mask, free, of_frames if free else of_frames.detach()

    def mask_loss(self, mask: Tensor, audio: Tensor, direct: Tensor, weight: Tensor) -> Tensor:
        """How far the logits `mask` of clips are from the true masks, a scalar. audio, direct [batch, mic=2, sample]:
        the clips, and the direct sound in them; weight [batch] of each clip."""
        return mask_loss(mask, self.front.true_mask(audio, direct), weight)

    def _convolved(self, x: Tensor) -> Tensor:
        """self.conv of maps [batch, 2 * band, frame, delay]; in training on a GPU by products."""
        # For the gradients of the weights alone: cuDNN's two slowest took 5.9 ms of 128 clips on an H200.
        if not (torch.is_grad_enabled() and runtime.prefers_products(x.device)):
            return self.conv(x)
        for conv, norm, gelu in _triples(self.conv):
            x = gelu(norm(products.strided3x3(x, conv.weight, conv.bias, conv.stride)))
        return x


def _gate(bands: int, maps: int) -> nn.Sequential:
    """Levels and peaks [batch, band + map, frame] -> [batch, map, frame], by 5 frames on either side; 0 at first."""
    last = nn.Conv1d(GATE_WIDTH, maps, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Conv1d(bands + maps, GATE_WIDTH, 5, padding=2), nn.GELU(),
                         nn.Conv1d(GATE_WIDTH, GATE_WIDTH, 5, padding=2), nn.GELU(), last)


def _conv_group_norm_gelu(channels_in: int, channels_out: int, stride: tuple[int, int]) -> tuple:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride, 1)
    return conv, nn.GroupNorm(math.gcd(4, channels_out), channels_out), nn.GELU()
