"""The published checkpoints: every tensor is used once, none is left; whatever is not one of them is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from erta.errors import ErtaError
from experiments.models.open_sora import checkpoint, convert
from experiments.models.open_sora.autoencoder import AutoencoderKLOpenSora
from experiments.models.open_sora.checkpoint import check, load_into, table
from experiments.models.open_sora.transformer import STDiT3Transformer3DModel
from experiments.scenes.tokenizer import build_tokenizer
from tests.pipelines import TINY_STDIT3, TINY_VAE, tiny_t5

SIZES = {
    "transformer": {
        "width": 24, "width_2": 48, "width_3": 72, "width_6": 144, "mlp": 96, "head": 12, "half_head": 6, "freq": 32, "text": 24,
        "tokens": 16,
    },
    "autoencoder": {"c0": 4, "c1": 8, "c2": 8, "c3": 16, "c2_2": 16, "c3_2": 32},
}  # fmt: skip
RUNS = {"transformer": {"pair": 2}, "autoencoder": {"n": [0, 1], "later": [1]}}


def build(part: str, tiny: bool = True) -> nn.Module:
    """A model of the part on the meta device."""
    with torch.device("meta"):
        if part == "transformer":
            return STDiT3Transformer3DModel(**(TINY_STDIT3 if tiny else {}))
        return AutoencoderKLOpenSora(**(TINY_VAE if tiny else {}))


def layout(part: str) -> dict[str, checkpoint.Entry]:
    """The tensors of a tiny checkpoint of the published layout."""
    return table(part, build(part), SIZES[part], RUNS[part])


def write(part: str, folder: Path) -> Path:
    """Such a checkpoint with random values, in two files."""
    torch.manual_seed(5)
    tensors = {name: torch.randn(entry.shape) for name, entry in layout(part).items()}
    folder.mkdir()
    half = len(tensors) // 2
    for index, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
        save_file({name: tensors[name] for name in names}, folder / f"model-{index}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("part", "tensors", "parameters"), [("transformer", 973, 1.207644e9), ("autoencoder", 517, 393.341e6)]
)
def test_the_table_is_the_model(part, tensors, parameters):
    """At the published size: each tensor of the model has one published one, of its shape. Mutants: any name or shape of the file.

    1.2076e9 is 1.12 of 2^30, which is how the authors print numbers of parameters (1.1B).
    """
    model = build(part, tiny=False)
    found = table(part, model)
    assert {entry.name: entry.shape for entry in found.values()} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    assert len(found) == len({entry.name for entry in found.values()}) == tensors
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=1e-4)
    published = {
        "transformer": "temporal_blocks.27.cross_attn.kv_linear.weight",
        "autoencoder": "temporal_vae.decoder.conv_blocks.2.conv.weight",
    }
    shapes = {"transformer": (2304, 1152), "autoencoder": (1024, 512, 3, 3, 3)}
    assert found[published[part]].shape == shapes[part]


@pytest.mark.parametrize("part", SIZES)
def test_every_tensor_is_used_once(part, tmp_path):
    """Mutants: two tensors swapped (spatial and temporal, query and key), one left at its first value."""
    folder, model = write(part, tmp_path / part), build(part)
    wanted = layout(part)
    load_into(model, folder, part, torch.float32, wanted)
    there = load_file(folder / "model-0.safetensors") | load_file(folder / "model-1.safetensors")
    here = model.state_dict()
    assert len(there) == len(here) and not any(tensor.is_meta for tensor in here.values())
    for name, entry in wanted.items():
        assert torch.equal(here[entry.name], there[name]), name
    if part == "transformer":
        assert wanted["temporal_blocks.1.attn.qkv.bias"].name == "blocks.1.temporal.attn.qkv.bias"


def test_a_constant_may_be_missing(tmp_path):
    """Mutant: weights left on the meta device. In bfloat16 the rotation stays exact."""
    folder, wanted = write("transformer", tmp_path / "t"), layout("transformer")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        tensors.pop("rope.freqs", None)
        save_file(tensors, file)
    model = build("transformer")
    load_into(model, folder, "transformer", torch.bfloat16, wanted)
    assert torch.equal(model.rope.freqs, STDiT3Transformer3DModel(**TINY_STDIT3).rope.freqs)
    assert model.head.proj.weight.dtype == torch.bfloat16


def broken(change):
    """The shapes of a tiny transformer, changed."""
    shapes = {name: entry.shape for name, entry in layout("transformer").items()}
    change(shapes)
    return shapes


BAD = {
    "half": (lambda s: [s.pop(name) for name in list(s) if name.startswith("temporal")], "is not whole: it lacks temporal_blocks.0"),
    "strange": (lambda s: s.update(extra=(1,)), "which has no extra: take hpcai-tech/OpenSora-STDiT-v3"),
    "1.1": (lambda s: s.update({"blocks.0.attn_temp.qkv.weight": (3, 1)}), "of Open-Sora 1.0 or 1.1"),
    "latent": (lambda s: s.update({"x_embedder.proj.weight": (24, 8, 1, 2, 2)}), r"has the shape \(24, 8, 1, 2, 2\), and Open-Sora 1.2's is \(24, 4, 1, 2, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_other_checkpoints_are_refused_by_name(name):
    change, said = BAD[name]
    with pytest.raises(ErtaError, match=said) as caught:
        check(broken(change), "transformer", layout("transformer"), Path("there"))
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).startswith("there is ")


def test_the_converter_makes_a_folder_that_loads(tmp_path, monkeypatch, capsys):
    """From three folders to a pipeline folder with the same weights; bad folders are one line each.

    Mutants: a folder that is overwritten, a T5 of another width that is taken, a missing T5 that ends in a traceback.
    """
    monkeypatch.setattr(checkpoint, "STDiT3Transformer3DModel", lambda: STDiT3Transformer3DModel(**TINY_STDIT3))
    monkeypatch.setattr(checkpoint, "AutoencoderKLOpenSora", lambda: AutoencoderKLOpenSora(**TINY_VAE))
    monkeypatch.setattr(checkpoint, "table", lambda part, model: table(part, model, SIZES[part], RUNS[part]))
    monkeypatch.setitem(checkpoint.data()["text_encoder"], "width", 24)
    folders = {"transformer": write("transformer", tmp_path / "t"), "vae": write("autoencoder", tmp_path / "v")}
    folders["text-encoder"] = tmp_path / "x"

    def run(out: str = "out") -> tuple[int, str]:
        given = [text for name, folder in folders.items() for text in (f"--{name}", str(folder))]
        code = convert.main([*given, "--out", str(tmp_path / out), "--dtype", "float32"])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    code, said = run()
    assert code == 1 and said.startswith("error: there is no folder") and "DeepFloyd/t5-v1_1-xxl" in said
    folders["text-encoder"].mkdir()
    code, said = run()
    assert code == 1 and "does not load as the T5" in said and len(said.strip().splitlines()) == 1
    tokenizer = build_tokenizer()
    tiny_t5(tokenizer).save_pretrained(folders["text-encoder"])
    tokenizer.save_pretrained(folders["text-encoder"])
    code, said = run()
    assert code == 0 and "model.path=" in said, said
    made = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    there = load_file(folders["transformer"] / "model-0.safetensors")
    assert torch.equal(made["patch_embedding.bias"], there["x_embedder.proj.bias"])
    assert run()[1].strip().endswith("exists already: choose another --out")
    monkeypatch.setitem(checkpoint.data()["text_encoder"], "width", 4096)
    assert "is a T5 of width 24, and Open-Sora 1.2 needs 4096" in run("other")[1]
    (folders["vae"] / "model-0.safetensors").write_bytes(b"half")
    assert "damaged or truncated" in run("other")[1]
