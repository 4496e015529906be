"""The rules of the house, read off the syntax trees: imports go down only, and nothing unsafe is called."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "core": set(),
    "options": {"core"},
    "nn": {"core", "options"},
    "flow": {"core", "options"},
    "data": {"core", "options"},
    "models": {"core", "options", "nn", "data"},
    "networks": {"core", "options", "nn"},
    "training": {"core", "options", "nn", "flow", "data", "networks"},
    "inference": {"core", "options", "nn", "flow", "data", "networks"},
}
BANNED_CALLS = {"torch.load", "pickle.load", "pickle.loads", "np.load", "numpy.load", "torch.nan_to_num"}
BANNED_CALLS |= {"eval", "exec", "hasattr"}
TORCH_FREE = [
    "library.core.files",
    "library.core.hashing",
    "library.core.checkpoint_files",
    "library.core.checkpoint_writer",
    "library.core.versions",
    "library.options.train",
    "library.options.inference",
    "library.data.schema",
    "library.data.scan",
    "library.data.plan",
    "library.data.captions",
    "library.data.prompt_files",
    "library.models.flux_vae_format",
    "library.models.gemma2_format",
    "library.models.gemma2_tokenizer",
    "library.models.lumina2_format",
    "library.models.lumina2_identity",
    "library.models.qwen2_5_vl_format",
    "library.training.trainer",
    "library.training.prepare",
    "library.training.trainee.network",
    "library.training.trainee.weights",
    "networks.lora_lumina",
    "networks.lora_kandinsky5",
    "networks.lycoris.module",
    "lumina_train_network",
    "lumina_train",
    "lumina_minimal_inference",
    "kandinsky5_train_network",
    "kandinsky5_train",
    "kandinsky5_minimal_inference",
    "tools.cache_latents",
]


def floor_of(path: Path) -> str | None:
    parts = path.relative_to(ROOT).parts
    if parts[0] == "networks":
        return "networks"
    return parts[1] if parts[0] == "library" and len(parts) > 2 else None


def sources() -> list[Path]:
    scripts = [*ROOT.glob("*.py"), *(ROOT / "tools").rglob("*.py")]
    return scripts + [*(ROOT / "library").rglob("*.py"), *(ROOT / "networks").rglob("*.py")]


def imported_floors(tree: ast.AST) -> set[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    floors = {name.split(".")[1] for name in names if name.startswith("library.") and name.count(".") >= 1}
    return floors | {"networks" for name in names if name.split(".")[0] == "networks"}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_lower_floors_and_calls_nothing_banned(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    floor = floor_of(path)
    if floor is not None:
        assert imported_floors(tree) - {floor} <= MAY_IMPORT[floor]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in BANNED_CALLS, f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert raises or not broad, f"line {node.lineno} swallows every exception"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_answers_before_torch_does_not_import_it(module):
    heavy = "('torch', 'transformers', 'accelerate')"
    code = f"import sys, {module}; sys.exit(', '.join(m for m in {heavy} if m in sys.modules) or 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_family_overrides_hooks_only():
    from kandinsky5_train_network import Kandinsky5Trainer
    from library.training.trainer import NetworkTrainer
    from lumina_train_network import LuminaTrainer

    final = {name for name, value in vars(NetworkTrainer).items() if getattr(value, "__final__", False)}
    assert final == {"train", "with_options"}
    for trainer in (LuminaTrainer, Kandinsky5Trainer):
        own = {name for name in vars(trainer) if not name.startswith("_")}
        assert own <= set(vars(NetworkTrainer)) | set(NetworkTrainer.__annotations__)
        assert not own & final


def test_whole_models_are_trained_by_the_same_trainer():
    """A family's second script says what is trained, and nothing else."""
    from kandinsky5_train import Kandinsky5Finetuner
    from kandinsky5_train_network import Kandinsky5Trainer
    from lumina_train import LuminaFinetuner
    from lumina_train_network import LuminaTrainer

    for finetuner, trainer in ((LuminaFinetuner, LuminaTrainer), (Kandinsky5Finetuner, Kandinsky5Trainer)):
        assert finetuner.__bases__ == (trainer,)
        assert {name for name in vars(finetuner) if not name.startswith("_")} == {"trainee_kind"}
