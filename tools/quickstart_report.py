"""What the quickstart leaves to look at: a loss curve, and pictures before and after training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw

TILE = 256
LABEL = 20
COLUMNS = ("photograph", "without LoRA", "with LoRA")


def main() -> None:
    """Write loss_curve.png and contact_sheet.png into --output_dir and say where they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--photos", type=Path, default=Path("examples/photos"))
    folder, photos = parser.parse_args().output_dir, parser.parse_args().photos
    network = next(folder.glob("*_lora.safetensors"))
    draw_loss_curve(last_session(folder / f"{network.stem}.metrics.jsonl"), folder / "loss_curve.png")
    draw_contact_sheet(rows_of(folder, photos), folder / "contact_sheet.png")
    for path in (network, folder / "loss_curve.png", folder / "contact_sheet.png"):
        print(path)


def last_session(metrics: Path) -> list[dict[str, float]]:
    """Return the records of the newest run in a metrics file, those with a training loss."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [r for r in records if r["session"] == records[-1]["session"] and "loss/current" in r]


def draw_loss_curve(records: list[dict[str, float]], path: Path) -> None:
    """Plot each step's loss and the reference tool's moving average."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [r["step"] for r in records]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    axes.plot(steps, [r["loss/current"] for r in records], color="0.75", linewidth=0.8, label="each step")
    axes.plot(steps, [r["loss/average"] for r in records], color="tab:blue", label="mean over an epoch")
    axes.set(xlabel="step", ylabel="velocity loss", title="LoRA on examples/photos, nano model")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def rows_of(folder: Path, photos: Path) -> list[tuple[Path, Path, Path]]:
    """Pair photographs with the pictures drawn from their captions; drawn files sort in prompt order."""
    prompts = Path("examples/quickstart_prompts.txt").read_text(encoding="utf-8").splitlines()
    captions = {p.read_text(encoding="utf-8").strip(): p for p in photos.glob("*.txt")}
    wanted = [captions[line.partition(" --")[0].strip()] for line in prompts if line.strip()]
    pictures = [next(p for p in photos.glob(f"{c.stem}.*") if p.suffix != ".txt") for c in wanted]
    before, after = (sorted((folder / name).glob("*.png")) for name in ("before", "after"))
    return list(zip(pictures, before, after, strict=True))


def draw_contact_sheet(rows: list[tuple[Path, Path, Path]], path: Path) -> None:
    """Draw one row a caption: the photograph, then the picture without and with the LoRA."""
    sheet = Image.new("RGB", (TILE * len(COLUMNS), LABEL + TILE * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(COLUMNS):
        pen.text((column * TILE + 6, 4), label, fill="black")
        for row, files in enumerate(rows):
            with Image.open(files[column]) as picture:
                tile = picture.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)
            sheet.paste(tile, (column * TILE, LABEL + row * TILE))
    sheet.save(path)


if __name__ == "__main__":
    main()
