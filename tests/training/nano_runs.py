"""Runs of both families on nano models, decided and not started: of a LoRA, or of the model itself."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from kandinsky5_train import Kandinsky5Finetuner
from kandinsky5_train_network import Kandinsky5Trainer
from library.options.group import parse_options
from library.options.train import LuminaFinetuneOptions, LuminaTrainOptions, TrainOptions
from library.options.train_kandinsky5 import Kandinsky5FinetuneOptions, Kandinsky5TrainOptions
from library.training.context import RunContext
from library.training.look.measure import RealSteps
from library.training.look.simulate import weight_bytes
from library.training.prepare import prepare
from lumina_train import LuminaFinetuner
from lumina_train_network import LuminaTrainer
from tools.make_nano_models import make_nano_kandinsky5

_OF_WEIGHTS = {
    "lumina": (LuminaFinetuneOptions, LuminaFinetuner),
    "kandinsky": (Kandinsky5FinetuneOptions, Kandinsky5Finetuner),
}
_OF_NETWORKS = {
    "lumina": (LuminaTrainOptions, LuminaTrainer),
    "kandinsky": (Kandinsky5TrainOptions, Kandinsky5Trainer),
}


class Runs:
    """Decides runs of both families on the same pictures. `of_networks`: a LoRA is trained."""

    def __init__(self, lumina: object, folder: Path, *, of_networks: bool = False) -> None:
        self._kinds = _OF_NETWORKS if of_networks else _OF_WEIGHTS
        self.folder = folder
        photos = folder / "1_thing"
        photos.mkdir()
        for name in ("red", "green"):
            Image.new("RGB", (96, 96), name).save(photos / f"{name}.png")
            (photos / f"{name}.txt").write_text(f"{name} picture")
        kandinsky = make_nano_kandinsky5(folder / "kandinsky")
        self.files = {
            "lumina": [
                *(f"--pretrained_model_name_or_path={lumina.dit}", f"--gemma2={lumina.gemma2}"),
                *(f"--ae={lumina.ae}", "--gemma2_max_token_length=30"),
            ],
            "kandinsky": [
                *(f"--dit={kandinsky.t2i}", f"--text_encoder_qwen={kandinsky.qwen}"),
                *(f"--text_encoder_clip={kandinsky.clip}", f"--vae={kandinsky.vae}"),
                "--qwen_max_token_length=30",
            ],
        }
        if of_networks:
            self.files["lumina"] += ["--network_module=networks.lora_lumina", "--network_dim=4"]
            self.files["kandinsky"] += ["--network_module=networks.lora_kandinsky5", "--network_dim=4"]
        self.words = [
            *(f"--train_data_dir={folder}", "--caption_extension=.txt", "--resolution=96"),
            *("--train_batch_size=2", "--max_train_steps=2", "--cache_latents", "--seed=1"),
            *("--cache_text_encoder_outputs", "--output_name=it", f"--output_dir={folder / 'out'}"),
        ]

    def options(self, family: str, *more: str) -> TrainOptions:
        """Return the options of a run."""
        kind, _ = self._kinds[family]
        return parse_options(kind, [*self.files[family], *self.words, *more])

    def context(self, family: str, *more: str) -> RunContext:
        """Return a run that is decided."""
        _, kind = self._kinds[family]
        trainer = kind(self.options(family, *more))
        return RunContext.decide(trainer, prepare(trainer))


def weight_bytes_of(real: RealSteps) -> int:
    """Return the bytes of the weights of real steps, each storage once."""
    module = torch.nn.Module()
    for number, tensor in enumerate(real.weights()):
        module.register_buffer(str(number), tensor.detach())
    return weight_bytes(module)
