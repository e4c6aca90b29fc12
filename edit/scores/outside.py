"""How far an edited picture departs from its source outside a box: L2, and LPIPS with both ways of masking.

LPIPS is a mean over positions of a network's features, so what is outside a box must be singled out somehow, and the
two ways differ: ``filled`` puts the same grey into the box of both pictures and takes plain LPIPS, whose mean is then
over all positions, of which those within the box say 0; ``map`` takes the spatial map of the untouched pictures and
its mean over the pixels outside, where those near the box still feel what changed within.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from edit.overlay import checked_box
from store.errors import Refusal

GREY = 128
"""What ``filled`` puts into the box; LPIPS sees it as nearly 0."""
SMALLEST = 32
"""Pixels of the shorter side: AlexNet's last features of anything smaller are empty."""
RANDOM = "random"
KERNELS = {
    0: (64, 3, 11, 11),
    3: (192, 64, 5, 5),
    6: (384, 192, 3, 3),
    8: (256, 384, 3, 3),
    10: (256, 256, 3, 3),
}
"""Shapes of AlexNet's convolutions by their number in ``features``."""
MEND = (
    'make such a file by: python -c "import torchvision, safetensors.torch as s; '
    "s.save_file(torchvision.models.alexnet(weights='DEFAULT').state_dict(), 'alexnet.safetensors')\""
)


@dataclass(frozen=True)
class Outside:
    """One edited picture against its source, of the pixels outside the box."""

    l2: float
    """Mean squared difference of RGB values in 0 … 1."""
    lpips_filled: float
    """LPIPS of both pictures with the box filled with grey; its mean has the box's positions too, which are 0."""
    lpips_map: float
    """Mean of the LPIPS map over the pixels outside."""
    lpips: str
    """What LPIPS that is: ``LPIPS (AlexNet)``, or ``LPIPS (random trunk)``, which is not the published metric."""
    pixels: int
    """Pixels outside that were counted."""


class Perception:
    """LPIPS of AlexNet (Zhang et al. 2018, version 0.1, with its learned linear layers).

    Parameters
    ----------
    trunk
        ``random``: AlexNet with seeded random weights, which needs no download; deterministic, and every result says
        that it is not the published metric. Otherwise the path of a safetensors file with the ``features.*`` weights
        of torchvision's AlexNet.
    device
        Where it computes.

    Raises
    ------
    Refusal
        The file is missing, is no safetensors file, or lacks a weight.
    """

    def __init__(self, trunk: str | Path = RANDOM, device: str | torch.device = "cpu"):
        held = None if trunk == RANDOM else _trunk(Path(trunk))
        import lpips  # slow to import

        self.name = "LPIPS (random trunk)" if trunk == RANDOM else "LPIPS (AlexNet)"
        self.device = torch.device(device)
        # torchvision warns that the call within lpips is an old one.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            self._network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        if held is not None:
            names = {name.split(".", 1)[1]: name for name in self._network.net.state_dict()}
            self._network.net.load_state_dict({names[name]: value for name, value in held.items()})
        self._network.requires_grad_(False).eval().to(self.device)

    def distance(self, a: np.ndarray, b: np.ndarray) -> float:
        """Plain LPIPS of two pictures, uint8 (height, width, 3)."""
        return float(self._run(a, b, spatial=False))

    def map(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """LPIPS by position, float32 (height, width), of two pictures, uint8 (height, width, 3)."""
        return self._run(a, b, spatial=True)[0, 0].cpu().numpy()

    @torch.inference_mode()
    def _run(self, a: np.ndarray, b: np.ndarray, spatial: bool) -> torch.Tensor:
        height, width = a.shape[:2]
        if min(height, width) < SMALLEST:
            raise Refusal(f"LPIPS needs {SMALLEST} pixels a side and the picture has {width}×{height}: enlarge it")
        both = torch.from_numpy(np.stack([a, b])).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        self._network.spatial = spatial
        return self._network(both[:1], both[1:])


def _trunk(path: Path) -> dict[str, torch.Tensor]:
    """The convolutions of torchvision's AlexNet, as ``3.weight`` for its ``features.3.weight``."""
    shapes = {f"{number}.weight": shape for number, shape in KERNELS.items()}
    shapes |= {f"{number}.bias": shape[:1] for number, shape in KERNELS.items()}
    found = {}
    try:
        with safe_open(path, "pt") as file:
            held = set(file.keys())
            for name, shape in shapes.items():
                key = f"features.{name}"
                if key not in held:
                    raise Refusal(f"{path} has no {key!r} of torchvision's AlexNet: {MEND}")
                found[name] = file.get_tensor(key)
                if found[name].shape != shape:
                    told = f"{list(found[name].shape)}, not {list(shape)}"
                    raise Refusal(f"{key!r} in {path} has the shape {told} as torchvision's AlexNet: {MEND}")
    except (OSError, SafetensorError) as failure:
        raise Refusal(f"{path} cannot be read as safetensors ({failure}): {MEND}") from failure
    return found


class Place:
    """The source picture and its box: what every edit of it is measured against.

    Parameters
    ----------
    source
        RGB.
    box
        x1, y1, x2, y2 in pixels; a pixel that it touches lies within.

    Raises
    ------
    Refusal
        The picture is not RGB, the box is none, or nothing lies outside of it.
    """

    def __init__(self, source: Image.Image, box: Sequence[float]):
        self.source = pixels_of(source)
        x1, y1, x2, y2 = checked_box(box, source.size)
        self.outside = np.ones(self.source.shape[:2], bool)
        """Which pixels lie outside, boolean (height, width)."""
        self.outside[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = False
        if not self.outside.any():
            raise Refusal(
                f"box {[x1, y1, x2, y2]} covers the whole picture of {source.width}×{source.height}: "
                "nothing lies outside to be measured"
            )

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.source.shape[1], self.source.shape[0]

    def edited(self, picture: Image.Image) -> np.ndarray:
        """An edited picture's pixels, uint8 (height, width, 3); refused if it has another size than the source."""
        if picture.size != self.size:
            raise Refusal(
                f"the edited picture has {picture.width}×{picture.height} pixels and its source "
                f"{self.size[0]}×{self.size[1]}: resize it first"
            )
        return pixels_of(picture)

    def l2(self, edited: np.ndarray, counted: np.ndarray) -> float:
        """Mean squared difference in 0 … 1 over the ``counted`` pixels, boolean (height, width)."""
        difference = self.source[counted].astype(np.float32) - edited[counted]
        return float(np.square(difference / 255).mean(dtype=np.float64))

    def measure(self, edited: np.ndarray, counted: np.ndarray, perception: Perception) -> Outside:
        """All of it, over the ``counted`` pixels, boolean (height, width); ``filled`` fills all others."""
        filled = [np.where(counted[..., None], one, np.uint8(GREY)) for one in (self.source, edited)]
        return Outside(
            l2=self.l2(edited, counted),
            lpips_filled=perception.distance(*filled),
            lpips_map=float(perception.map(self.source, edited)[counted].mean(dtype=np.float64)),
            lpips=perception.name,
            pixels=int(counted.sum()),
        )


def pixels_of(picture: Image.Image) -> np.ndarray:
    """uint8 (height, width, 3); refused if it is not RGB."""
    if picture.mode != "RGB":
        raise Refusal(f"a {picture.mode} picture cannot be scored: convert it to RGB")
    return np.asarray(picture)


def outside(source: Image.Image, edited: Image.Image, box: Sequence[float], perception: Perception) -> Outside:
    """An edited picture against its source, RGB of one size, outside a box (xyxy in pixels).

    Raises
    ------
    Refusal
        Another size or mode, a box that is none or leaves nothing outside, or a picture too small for LPIPS.
    """
    place = Place(source, box)
    return place.measure(place.edited(edited), place.outside, perception)
