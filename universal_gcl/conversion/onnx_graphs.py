"""Exports a model as ONNX graphs, which onnxruntime runs without PyTorch: `image.onnx`, `text.onnx` and `fused.onnx`.

- The inputs are the processor's outputs, under the same names. The output is a unit vector per row: fusion, text
  pooling and centring are part of the graph.
- Batches may have any size, and texts any length that the text tower takes. Images have the processor's size.
- Before the folder appears, every graph is run on rows that it was not traced with, and compared with the model.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from modeling_gcl import GCLModel, GCLProcessor
from modeling_gcl.modalities import FEATURES, IN_DATA
from universal_gcl.conversion.report import Conversion
from universal_gcl.retrieval.new_folder import check_is_new, new_folder

GRAPHS = {FEATURES[modality]: parts.split(",") for modality, parts in IN_DATA.items()}  # "fused" → ["image", "text"]
PROCESSOR_ARGUMENTS = {"image": "images", "text": "text"}
NOISY_LOGGERS = ("torch.onnx", "torch.fx", "onnxscript")  # they report missing packages that aren't needed
MAX_DIFFERENCE = 1e-4  # of one coordinate of a unit vector, in float32
TRACED_TEXTS = ["one", "two two", "one two three"]
COMPARED_TEXTS = ["three", "one two", "three two one " * 100, "two", "one two one two"]


class Graph(nn.Module):
    """The part of a model that gives one kind of features; `names` are those of the inputs, in order."""

    def __init__(self, model: GCLModel, feature: str, names: list[str]):
        super().__init__()
        self.model, self.feature, self.names = model, feature, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The processor's outputs → (N, D) unit vectors."""
        inputs = dict(zip(self.names, tensors))
        output = self.model(**inputs, modalities=(self.feature,), return_loss=False, return_dict=True)
        return output[f"{self.feature}_embeds"]


def convert_to_onnx(model: str | Path, out_dir: str | Path, revision: str | None = None) -> Conversion:
    """Write the three graphs in float32, and the processor.

    The folder appears whole or not at all.

    Args:
        model: folder or Hub id of a GCL checkpoint or any dual encoder that GCL wraps.
        out_dir: folder to write; must be absent or empty.
        revision: revision on the Hub.

    Returns:
        The folder, with a note per graph: its inputs, and the largest difference from the model.

    Raises:
        ValueError: torch can't export the backbone (with torch's reason), or a graph differs from the model by more
            than `MAX_DIFFERENCE`.
        FileExistsError: `out_dir` is not empty.
        ModuleNotFoundError: onnxruntime or onnxscript is not installed.
        OSError: there is no such folder or id.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}: pip install "universal-gcl[onnx]"') from error
    out_dir = Path(out_dir)
    check_is_new(out_dir)
    processor = GCLProcessor.from_encoder(model, revision=revision)
    encoder = GCLModel.from_encoder(model, processor=processor, revision=revision, dtype=torch.float32).eval()
    with new_folder(out_dir) as folder:
        processor.save_pretrained(folder)
        notes = [export_graph(encoder, processor, feature, folder / f"{feature}.onnx") for feature in GRAPHS]
    return Conversion(out_dir, notes)


def export_graph(model: GCLModel, processor: GCLProcessor, feature: str, file: Path) -> str:
    """Write the graph of one kind of features and compare it with the model.

    Args:
        model: in float32 and eval mode.
        processor: the model's processor.
        feature: "image", "text" or "fused".
        file: the `.onnx` file to write.

    Returns:
        A line with the inputs, the largest difference from the model and, if the graph takes shorter texts than the
        processor gives, the longest text.

    Raises:
        ValueError: see `convert_to_onnx`.
    """
    inputs = example(processor, feature, TRACED_TEXTS)
    batch, any_length = torch.export.Dim("batch"), torch.export.Dim.DYNAMIC
    # text towers without a mask take texts of one length only
    text_axes: dict[int, Any] = {0: batch} if processor.text_padding == "max_length" else {0: batch, 1: any_length}
    text_inputs = processor.tokenizer.model_input_names
    axes = tuple(text_axes if name in text_inputs else {0: batch} for name in inputs)
    program = export(Graph(model, feature, list(inputs)), inputs, (axes,))
    longest = name_axes(program)
    program.save(file)

    line = f"{file.name}: {', '.join(inputs)} → {feature}_embeds"
    if longest is not None and example(processor, "text", COMPARED_TEXTS)["input_ids"].shape[1] > longest:
        line += f"; cut texts to {longest} tokens: processor(..., max_length={longest})"
    difference = compare(file, model, example(processor, feature, COMPARED_TEXTS, max_length=longest))
    return f"{line}; differs from the model by {difference:.1e}"


def example(
    processor: GCLProcessor, feature: str, texts: list[str], max_length: int | None = None
) -> dict[str, torch.Tensor]:
    """The processor's output for a batch of noise images and `texts`."""
    images = [Image.effect_noise((64, 48), 50 + 20 * index).convert("RGB") for index in range(len(texts))]
    rows: dict[str, list] = {"image": images, "text": texts}
    given: dict[str, Any] = {PROCESSOR_ARGUMENTS[part]: rows[part] for part in GRAPHS[feature]}
    if max_length is not None:
        given["max_length"] = max_length
    return dict(processor(**given, return_tensors="pt"))


def export(graph: Graph, inputs: dict[str, torch.Tensor], axes: tuple) -> torch.onnx.ONNXProgram:
    """Trace the graph with `inputs`. Their `axes` may have any size in the traced graph.

    Raises:
        ValueError: torch can't export the graph.
    """
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # if torch.onnx.export traced itself, it would fall back to fixed sizes after a failure
            traced = torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=axes, strict=False)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                verbose=False,
                input_names=list(inputs),
                output_names=[f"{graph.feature}_embeds"],
            )
            assert program is not None  # it is None only without dynamo
            return program
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"torch can't export {type(graph.model.encoder).__name__}'s {graph.feature} embeddings: {reason}"
        ) from error
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def name_axes(program: torch.onnx.ONNXProgram) -> int | None:
    """Name the axes `batch` and `text_length`.

    Returns:
        The longest text that the traced code takes; None if there is no such axis or no bound.
    """
    shapes = [value.shape for value in program.model.graph.inputs if value.shape is not None]
    batch = {shape[0] for shape in shapes if not isinstance(shape[0], int)}
    length = {shape[1] for shape in shapes if not isinstance(shape[1], int)}
    program.rename_axes({**dict.fromkeys(batch, "batch"), **dict.fromkeys(length, "text_length")})
    assert program.exported_program is not None  # `export` made it
    upper = {str(symbol): value.upper for symbol, value in program.exported_program.range_constraints.items()}
    bounds = [upper[axis.value] for axis in length if axis.value in upper]
    return int(bounds[0]) if bounds and bounds[0].is_finite else None


@torch.inference_mode()
def compare(file: Path, model: GCLModel, inputs: dict[str, torch.Tensor]) -> float:
    """The largest difference between a coordinate of the graph's embeddings and the model's.

    Raises:
        ValueError: it is larger than `MAX_DIFFERENCE`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    name = session.get_outputs()[0].name
    feature = name.removesuffix("_embeds")
    expected = model(**inputs, modalities=(feature,), return_loss=False, return_dict=True)[name]
    found = torch.from_numpy(session.run([name], {key: value.numpy() for key, value in inputs.items()})[0])
    difference = (found - expected).abs().max().item()
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(f"{file.name} differs from the model by {difference:.1e}, so nothing is written")
    return difference
