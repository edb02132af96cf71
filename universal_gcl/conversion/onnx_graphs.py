"""A model as ONNX graphs, which onnxruntime runs without PyTorch: `image.onnx`, `text.onnx` and `fused.onnx`.

- Each takes what the processor makes of its rows, under the processor's names, and gives unit vectors: fusion, text
  pooling and centring are inside.
- Batches may have any size and texts any length that the text tower takes; images have the processor's size.
- Every graph is run before it is handed over, on rows other than those it was traced with, and compared with the model.
"""

import logging
import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from modeling_gcl import GCLModel, GCLProcessor
from universal_gcl.retrieval.new_folder import check_is_new, new_folder

INPUTS = {"image": ("image",), "text": ("text",), "fused": ("image", "text")}
NOISY = ("torch.onnx", "torch.fx", "onnxscript")  # they tell of packages and optimisations that aren't needed
MAX_DIFFERENCE = 1e-4  # of an entry of a unit vector, in float32
TRACED = ["one", "two two", "one two three"]
COMPARED = ["three", "one two", "three two one " * 100, "two", "one two one two"]


class Graph(nn.Module):
    """The part of a model that embeds one modality, with `names` for its inputs in their order."""

    def __init__(self, model, modality, names):
        super().__init__()
        self.model, self.modality, self.names = model, modality, names

    def forward(self, *tensors):
        """Inputs as the processor makes them → (N, D) unit vectors."""
        inputs = dict(zip(self.names, tensors))
        output = self.model(**inputs, modalities=(self.modality,), return_loss=False, return_dict=True)
        return output[f"{self.modality}_embeds"]


def convert_to_onnx(model: str | Path, out_dir: str | Path, revision: str | None = None) -> str:
    """Writes the three graphs, in float32, and the processor beside them.

    The folder appears whole or not at all.

    Args:
        model: folder or Hub id of a GCL checkpoint or any dual encoder that GCL wraps.
        out_dir: folder to write; must be absent or empty.
        revision: of the Hub.

    Returns:
        A report of a line a graph: its inputs, and the largest difference to the model.

    Raises:
        ValueError: a backbone that torch cannot export, named with torch's reason, or a graph that differs from the
            model by more than `MAX_DIFFERENCE`.
        FileExistsError: `out_dir` is not empty.
        ModuleNotFoundError: onnxruntime or onnxscript is not installed.
        OSError: no such folder or id.
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
    lines = [str(out_dir)]
    with new_folder(out_dir) as folder:
        processor.save_pretrained(folder)
        lines += [export_graph(encoder, processor, modality, folder / f"{modality}.onnx") for modality in INPUTS]
    return "\n".join(lines)


def export_graph(model: GCLModel, processor: GCLProcessor, modality: str, file: Path) -> str:
    """Writes the graph of one modality, "image", "text" or "fused", and compares it with the model.

    Args:
        model: float32, in eval mode.

    Returns:
        A line that names its inputs, the longest text where that is less than the processor makes, and the difference.

    Raises:
        ValueError: as for `convert_to_onnx`.
    """
    inputs = example(processor, modality, TRACED)
    batch, any_length = torch.export.Dim("batch"), torch.export.Dim.DYNAMIC
    # towers without a mask know texts of one length only
    text_axes = {0: batch} if processor.text_padding == "max_length" else {0: batch, 1: any_length}
    text_inputs = processor.tokenizer.model_input_names
    axes = tuple(text_axes if name in text_inputs else {0: batch} for name in inputs)
    program = export(Graph(model, modality, list(inputs)), inputs, (axes,))
    longest = name_axes(program)
    program.save(file)

    line = f"{file.name}: {', '.join(inputs)} → {modality}_embeds"
    if longest is not None and example(processor, "text", COMPARED)["input_ids"].shape[1] > longest:
        line += f"; cut texts to {longest} tokens: processor(..., max_length={longest})"
    difference = compare(file, model, example(processor, modality, COMPARED, max_length=longest))
    return f"{line}; differs from the model by {difference:.1e}"


def example(processor: GCLProcessor, modality: str, texts: list[str], max_length: int | None = None) -> dict:
    """Noise and `texts` as the processor makes a batch of them."""
    rows = {"images": [Image.effect_noise((64, 48), 50 + 20 * index).convert("RGB") for index in range(len(texts))]}
    rows["text"] = texts
    given = {"image": ["images"], "text": ["text"], "fused": ["images", "text"]}[modality]
    limit = {} if max_length is None else {"max_length": max_length}
    return dict(processor(**{name: rows[name] for name in given}, **limit, return_tensors="pt"))


def export(graph: Graph, inputs: dict, axes: tuple) -> torch.onnx.ONNXProgram:
    """The graph traced with `inputs`, whose `axes` may have any size; errors say what was exported."""
    names = {"input_names": list(inputs), "output_names": [f"{graph.modality}_embeds"]}
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # traced here: torch.onnx.export would try other ways after a failure, with sizes that are fixed
            traced = torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=axes, strict=False)
            return torch.onnx.export(traced, dynamo=True, verbose=False, **names)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"torch cannot export {type(graph.model.encoder).__name__}'s {graph.modality} embeddings: {reason}"
        ) from error
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def name_axes(program: torch.onnx.ONNXProgram) -> int | None:
    """Calls the axes `batch` and `text_length`. Returns the longest text that the traced code takes; None where there
    is no such axis, or no bound."""
    shapes = [value.shape for value in program.model.graph.inputs]
    batch = {shape[0] for shape in shapes}
    length = {shape[1] for shape in shapes if not isinstance(shape[1], int)}
    program.rename_axes(dict.fromkeys(batch, "batch") | dict.fromkeys(length, "text_length"))
    bounds = {str(symbol): value.upper for symbol, value in program.exported_program.range_constraints.items()}
    bounds = [bounds[axis.value] for axis in length if axis.value in bounds]
    return int(bounds[0]) if bounds and bounds[0].is_finite else None


@torch.inference_mode()
def compare(file: Path, model: GCLModel, inputs: dict) -> float:
    """The largest difference between the embeddings of the graph and the model's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    name = session.get_outputs()[0].name
    modality = name.removesuffix("_embeds")
    expected = model(**inputs, modalities=(modality,), return_loss=False, return_dict=True)[name]
    found = torch.from_numpy(session.run([name], {key: value.numpy() for key, value in inputs.items()})[0])
    difference = (found - expected).abs().max().item()
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(f"{file.name} differs from the model by {difference:.1e}: it is not written")
    return difference
