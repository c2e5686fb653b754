"""`epmvg convert`: a checkpoint of the original TransVG as a folder for `from_pretrained`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import epmvg_hf

if TYPE_CHECKING:
    from transformers import BertTokenizer, PreTrainedConfig

    from ..model.modeling_epmvg import EpmVGForVisualGrounding


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="The .pth file that TransVG saved.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Argument(help="New folder for model and processor.", file_okay=False)],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="Folder or Hub id of the tokenizer, which the checkpoint lacks. With none, only the model and "
            "an image processor are written."
        ),
    ] = "google-bert/bert-base-uncased",
    image_size: Annotated[
        int | None, typer.Option(help="Canvas in pixels, for a checkpoint that does not say it; 640 by default.")
    ] = None,
) -> None:
    """
    Convert a checkpoint of the original TransVG to a folder that can be loaded, fine-tuned and shared.

    Nothing in the checkpoint is executed. Each tensor that is not converted is printed with the reason.

    \b
        epmvg convert best_checkpoint.pth transvg_unc
        epmvg convert best_checkpoint.pth weights --tokenizer none
    """
    if output.exists() and any(output.iterdir()):
        raise typer.BadParameter(f"{output} is not empty: expected a new folder")
    epmvg_hf.register()
    from ..model.convert_transvg import convert_transvg, read_transvg_checkpoint
    from ..model.image_processing_epmvg import EpmVGImageProcessor
    from ..model.processing_epmvg import EpmVGProcessor

    tensors, args, unused = read_transvg_checkpoint(checkpoint)
    model, unused_tensors = convert_transvg(tensors, args, image_size)
    # This is the evaluation transform of TransVG. It is spelled out so that the folder does not depend on defaults.
    side = model.config.image_size
    processor = EpmVGImageProcessor(size={"height": side, "width": side}, pad_offset=0.5)
    if tokenizer != "none":
        words = _load_tokenizer(tokenizer, model)
        processor = EpmVGProcessor(processor, words, max_text_length=model.config.max_text_length, do_lower_case=True)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    typer.echo(_report(model, len(tensors) - len(unused_tensors), unused | unused_tensors))
    typer.echo(f"written to {output}")


def _load_tokenizer(name: str, model: "EpmVGForVisualGrounding") -> "BertTokenizer":
    """The tokenizer of that name; raises a `ValueError` if there is none or if it has more tokens than the model."""
    from transformers import BertTokenizer

    try:
        # TransVG uses BERT's tokenizer only. Unlike AutoTokenizer, this class loads a folder with just a vocab.txt.
        tokenizer = BertTokenizer.from_pretrained(name)
    except Exception as error:  # a folder or a download can fail in many ways
        raise ValueError(f"there is no tokenizer in {name}: {error}") from error
    text_config: PreTrainedConfig = model.config.text_config
    vocab_size = text_config.vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{name} has {len(tokenizer)} tokens, but the checkpoint has embeddings for {vocab_size} only"
        )
    if len(tokenizer) < vocab_size:
        typer.echo(f"warning: {name} has only {len(tokenizer)} of the {vocab_size} tokens that the checkpoint embeds")
    return tokenizer


def _report(model: "EpmVGForVisualGrounding", used: int, unused: dict[str, str]) -> str:
    """Describes the model, and lists how many tensors were converted and why the others were not."""
    config = model.config
    resnet: PreTrainedConfig = config.backbone_config
    bert: PreTrainedConfig = config.text_config
    lines = [
        f"ResNet {resnet.depths}, {config.encoder_layers} encoder layers, "
        f"{bert.num_hidden_layers} layers of BERT, {config.fusion_layers} fusion layers, "
        f"{config.image_size} pixels, {config.max_text_length} tokens",
        f"{used} tensors converted; not used:",
        *(f"- {name}: {reason}" for name, reason in unused.items()),
    ]
    return "\n".join(lines)
