"""Train a small denoiser or 2x super-resolver on photographs of a folder, with QualityLoss added to the pixel loss.

    python examples/restoration/train.py --photographs DIR --out runs/mine [--task sr2] [--weight 0.01]

Needs the package alone and takes minutes on a CPU. The restorer, a table of measures and a sheet of held-out
photographs are written to --out. With `--start runs/other/restorer.safetensors` training continues another restorer,
the usual order: pixel loss alone first, then with the score.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from measures import Measures, means, sheet
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tasks import TASKS, Crops, Task, read_middle, split, spread
from torch import Tensor, nn
from tqdm import tqdm

from qualiclip_pyiqa import QualityLoss
from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError
from qualiclip_pyiqa.files import replacing


def fit(
    restorer: nn.Module,
    task: Task,
    crops: Crops,
    quality: QualityLoss | None,
    *,
    steps: int,
    batch: int = 4,
    rate: float = 1e-3,
    seed: int = 0,
) -> None:
    """Train a restorer in place, by the mean absolute error of pixels and, if given, the quality loss.

    Args:
        rate: Adam's first learning rate, which falls to 0 along a cosine.
        seed: of crops and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(restorer.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    restorer.to(memory_format=torch.channels_last).train()  # faster on a CPU
    for _ in tqdm(range(steps), unit="step", mininterval=5, disable=None):
        target = crops.draw(batch, generator)
        restored = restorer(task.degrade(target, generator).to(memory_format=torch.channels_last))
        loss = F.l1_loss(restored, target)
        if quality is not None:
            loss = loss + quality(restored, target)  # the target counts only if the loss is relative to it
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def restore(restorer: nn.Module, task: Task, targets: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Degrade each target, always alike, and restore it -> inputs at the size of the output, outputs."""
    generator = torch.Generator().manual_seed(0)
    degraded = [task.degrade(target, generator) for target in targets]
    restorer.eval()
    return [task.enlarge(each) for each in degraded], [restorer(each).clamp(0, 1) for each in degraded]


def save(restorer: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in restorer.state_dict().items()}, part)


def load(task: Task, path: Path) -> nn.Module:
    """Read a restorer that `save` wrote.

    Raises:
        SettingsError: the file is of another task or kind, or cannot be read.
    """
    restorer = task.network()
    try:
        restorer.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise SettingsError(f"{path} cannot be read ({error}); expected a restorer of this task") from error
    except RuntimeError as error:  # it names every tensor, line by line
        raise SettingsError(f"{path} has other tensors; expected a restorer of this task") from error
    return restorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task", choices=TASKS, default="denoise", help="default: %(default)s")
    parser.add_argument("--metric", default="qualiclip-mini", help="of the loss: a name or file (default: %(default)s)")
    parser.add_argument("--weight", type=float, default=0.01, help="of the score; 0: none (default: %(default)s)")
    parser.add_argument("--relative-to", choices=("target",), help="see QualityLoss (default: neither)")
    parser.add_argument("--unseen", nargs="*", default=["qualiclip-mini+", "piqe"], help="metrics to measure with too")
    parser.add_argument("--start", type=Path, help="the restorer to continue with")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3, help="of learning, at first (default: %(default)s)")
    parser.add_argument("--crop", type=int, default=96, help="side, pixels (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=240, help="photographs to train on (default: %(default)s)")
    parser.add_argument("--measured", type=int, default=16, help="photographs held out (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps on few pixels: shows that it runs")
    options = parser.parse_args()
    side = 384
    if options.quick:
        options.steps, options.limit, options.measured, side = 3, 2, 1, 96
    try:
        run(options, side)
    except (ImageError, SettingsError, WeightsError) as error:
        sys.exit(f"error: {error}")


def check(options: argparse.Namespace) -> None:
    """Check the numbers before anything is read.

    Raises:
        SettingsError: one that training or measuring cannot use.
    """
    for name in ("steps", "batch", "limit", "measured"):
        if getattr(options, name) < 1:
            raise SettingsError(f"--{name} is {getattr(options, name)}; expected at least 1")
    if options.crop < 32 or options.crop % 2:
        raise SettingsError(f"--crop is {options.crop}; expected an even number of at least 32")
    if not 0 <= options.rate < math.inf:
        raise SettingsError(f"--rate is {options.rate}; expected a number of at least 0")


def run(options: argparse.Namespace, side: int) -> None:
    check(options)
    training, held_out = split(options.photographs)
    quality = None
    if options.weight:
        quality = QualityLoss(options.metric, weight=options.weight, relative_to=options.relative_to)
    measures = Measures([options.metric, *options.unseen])
    crops = Crops(spread(training, options.limit), options.crop)
    task = TASKS[options.task]
    torch.manual_seed(options.seed)
    restorer = task.network() if options.start is None else load(task, options.start)
    fit(restorer, task, crops, quality, steps=options.steps, batch=options.batch, rate=options.rate, seed=options.seed)
    save(restorer, options.out / "restorer.safetensors")
    targets = [read_middle(path, side) for path in spread(held_out, options.measured)]
    inputs, outputs = restore(restorer, task, targets)
    shown = {"input": inputs, "restored": outputs, "photograph": targets}
    table = {name: means(measures.of(images, targets)) for name, images in shown.items()}
    for name, row in table.items():
        print(name, *(f"{measure} {value:.3f}" for measure, value in row.items()))
    (options.out / "measures.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    lines = [dict(zip(shown, images, strict=True)) for images in zip(*shown.values(), strict=True)]
    sheet(
        [{name: image[..., :256, :256] for name, image in line.items()} for line in lines[:4]],
        options.out / "sheet.png",
    )


if __name__ == "__main__":
    main()
