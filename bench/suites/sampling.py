"""Suite `sampling`: whole runs of `ddpm.sample` and `ddpm.edit`, network, table and noise included, by every engine.

`short` is one image in four steps, where what a call prepares weighs most. `guided` has all that guidance can have: a
weight a sample, negative conditions, an interval, rescale. `img2img` begins a picture at half of T; `inpaint` knows the
upper half of one. `corrected` has a Langevin step after each but the last; `oblong` is of pictures 24 high and 16 wide.
"""

from functools import partial
from typing import Any

import torch

from bench.registry import Bench, Workload
from bench.suites.networks import SCHEDULE, SEED, SIDE, contexts, judged, network, sampling_cost
from ddpm import edit, sample
from ddpm.engines import competitors
from ddpm.inference import form_of
from ddpm.inference.inpaint import InpaintForm
from ddpm.networks import sample_shape

GUIDED = {"guidance_interval": (0.2, 0.8), "guidance_rescale": 0.7}
LOWER_HALF = (torch.arange(SIDE) >= SIDE // 2)[:, None].expand(SIDE, SIDE)
EDITED = {"img2img": {"strength": 0.5}, "inpaint": {"strength": 1.0, "mask": LOWER_HALF}}
WAYS = ("guided", *EDITED, "corrected", "oblong")


def _solver(way: str) -> str:
    return "pc" if way == "corrected" else "ddim"


def _build(way: str, steps: int, n: int, device: torch.device) -> Bench:
    model, context = network(device, (24, 16) if way == "oblong" else SIDE), contexts(n, device)
    options: dict[str, Any] = {"solver": _solver(way), "steps": steps, "context": context, "seed": SEED}
    if way == "guided":
        options |= GUIDED | {"guidance": torch.linspace(0, 4, n), "negative": context.roll(1, 1)}

    def draw(engine: str) -> torch.Tensor:
        if way in EDITED:
            image = torch.linspace(-1, 1, SIDE, device=device).expand(sample_shape(model))
            return edit(model, SCHEDULE, image, n, engine=engine, **options, **EDITED[way])
        return sample(model, SCHEDULE, n, engine=engine, **options)

    form = InpaintForm if way == "inpaint" else form_of(model)
    makes = {name: partial(partial, draw, name) for name in competitors(device, form=form)}
    rows = 2 * steps - 1 if way == "corrected" else round(steps * EDITED.get(way, {}).get("strength", 1.0))
    cost = sampling_cost(model, n, rows, 2.0 if way == "guided" else 1.0)
    eager = partial(draw, "eager")
    return Bench([()], eager, judged(eager, makes), cost, images=n)


def workloads(quick: bool) -> list[Workload]:
    """By way, steps and images."""
    usual = (5, 8) if quick else (20, 64)
    rows = [("", *usual), ("short", 4, 1), *((way, *usual) for way in WAYS)]
    found = []
    for way, steps, n in rows:
        name = f"sampling/{way}{'/' * bool(way)}{_solver(way)}{steps}/n{n}"
        found.append(Workload(name, "sampling", partial(_build, way, steps, n)))
    return found
